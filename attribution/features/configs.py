"""What the cfg.json of an autoencoder says, in our words: of SAELens (before and since version 6) and of eai-sparsify.

A config that asks for a computation which `Autoencoder` does not do is refused; nothing that matters is passed over.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Activation, Normalisation
from attribution.features.places import Place, parse_place


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape there, and whether it is the transpose of ours."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Config:
    """What an autoencoder is and where it sits, without its weights.

    Attributes:
        origin: "SAELens" or "sparsify", by which it was written.
        architecture: its name there, as "jumprelu_skip_transcoder".
        n_features, d_in, d_out: its sizes.
        reads: where it reads; None when the config does not say it in a way that is known.
        writes: where what it decodes belongs: of a transcoder elsewhere than `reads`, or None when it is not said.
        hook: the place that it reads, as the config has it.
        model_name: the model that it was trained on, as the config has it.
        prepend_bos: whether it was trained on texts that begin with the special token; None when it is not said.
        stored: the tensors that the file holds, by their names in `Autoencoder`.
    """

    origin: str
    architecture: str
    activation: Activation
    n_features: int
    d_in: int
    d_out: int
    stored: dict[str, Stored]
    reads: Place | None
    writes: Place | None
    is_transcoder: bool = False
    hook: str | None = None
    model_name: str | None = None
    prepend_bos: bool | None = None
    k: int | None = None
    subtracts_b_dec: bool = False
    rescaled: bool = False
    normalisation: Normalisation = "none"
    centred: bool = False


ARCHITECTURES: dict[str, tuple[Activation, bool, bool]] = {
    "standard": ("relu", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "gated": ("gated", False, False),
    "topk_transcoder": ("topk", True, False),
    "topk_skip_transcoder": ("topk", True, True),
    "transcoder": ("relu", True, False),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
"""The architectures of SAELens, and transcoders that keep the k largest, which it does not have: the activation,
whether it is a transcoder, whether it has a skip connection."""

NORMALISATIONS: dict[str, Normalisation] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
"""How the normalisations that are done are called in SAELens."""
WITH_SAELENS = "load it with sae-lens and save it again with save_inference_model, or `sightline sae convert` it"
"""What to do about a folder that sae-lens reads and we do not."""
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
CENTRED_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Where it matters whether what a model writes to the stream was centred; a norm takes the mean away, too."""


class _Reader:
    """The values of a cfg.json, each checked when it is asked for."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def refuse(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"{self.path}: {what}", param="folder")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of this kind; the default where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refuse(f"{name} is {value!r}; expected {kind.__name__}")
        return value

    def count(self, name: str) -> int:
        """A value that is a count."""
        value = self.get(name, int)
        if value is None or value < 1:
            raise self.refuse(f"{name} is {value!r}; expected a whole number above 0")
        return value

    def place(self, *names: str) -> Place | None:
        """The place that the first of these values names, of those that name one which is known."""
        places = (_known(self.get(name, str, "")) for name in names)
        return next((place for place in places if place is not None), None)


def saelens_config(path: Path, values: dict[str, Any]) -> Config:
    """The config of a directory of SAELens.

    Raises:
        InvalidArgument: it asks for what is not done, or says nothing that makes sense; what to do.
    """
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    metadata = values.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise _Reader(path, values).refuse(f"metadata is {metadata!r}; expected an object")
    # before version 6 what is metadata now stood at the top
    config = _Reader(path, {**values, **metadata})
    architecture = _architecture(config, flat="metadata" not in values)
    activation, transcoder, skip = ARCHITECTURES[architecture]
    reads = config.place("hf_hook_name", "hook_name")
    out = config.place("hf_hook_name_out", "hook_name_out")
    _refuse_what_is_not_done(config, reads, transcoder)
    d_in, n_features = config.count("d_in"), config.count("d_sae")
    d_out = config.count("d_out") if transcoder else d_in
    return Config(
        origin="SAELens",
        architecture=architecture,
        activation=activation,
        n_features=n_features,
        d_in=d_in,
        d_out=d_out,
        stored=_saelens_tensors(activation, skip, d_in, n_features, d_out),
        reads=reads,
        writes=out if transcoder else reads,
        is_transcoder=transcoder,
        hook=config.get("hook_name", str) or config.get("hf_hook_name", str),
        model_name=config.get("model_name", str),
        prepend_bos=config.get("prepend_bos", bool),
        k=_k(config, n_features) if activation == "topk" else None,
        subtracts_b_dec=config.get("apply_b_dec_to_input", bool, not transcoder),
        rescaled=activation == "topk" and config.get("rescale_acts_by_decoder_norm", bool, False),
        normalisation=_normalisation(config),
        centred=_is_centred(config, reads, flat="metadata" not in values),
    )


def _architecture(config: _Reader, *, flat: bool) -> str:
    architecture = config.get("architecture", str, "standard" if flat else None)
    activation = config.get("activation_fn", str, "relu")
    if flat and activation == "topk":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise config.refuse(f"the activation function {activation!r} is not done; relu and topk are")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        raise config.refuse(f"it was saved to be trained further ({architecture}), with no threshold; {WITH_SAELENS}")
    if architecture not in ARCHITECTURES:
        raise config.refuse(f"the architecture {architecture!r} is not done; {', '.join(ARCHITECTURES)} are")
    return architecture


def _refuse_what_is_not_done(config: _Reader, reads: Place | None, transcoder: bool) -> None:
    if config.get("hook_head_index", int) is not None or config.get("hook_head_index_out", int) is not None:
        raise config.refuse("it reads or writes one head alone (hook_head_index), which is not done")
    if transcoder and config.get("apply_b_dec_to_input", bool, False):
        raise config.refuse("apply_b_dec_to_input is true, which no transcoder can do; set it to false")
    reshape = config.get("reshape_activations", str, "none")
    hook = config.get("hook_name", str)
    if reshape not in ("none", "hook_z") or (reshape == "hook_z" and hook is not None and not hook.endswith("_z")):
        raise config.refuse(f"reshape_activations is {reshape!r} at {hook!r}; it is 'none', or 'hook_z' at a hook_z")
    if config.get("finetuning_scaling_factor", bool, False):
        raise config.refuse(f"its finetuning_scaling_factor is not folded into its weights; {WITH_SAELENS}")
    processed = config.get("model_from_pretrained_kwargs", dict, {})
    point = None if reads is None else reads.point
    if (processed.get("fold_ln") and point == "mlp_in") or (processed.get("fold_value_biases") and point == "z"):
        raise config.refuse(f"it was trained at {reads} of a model with other weights ({processed}), which is not done")


def _k(config: _Reader, n_features: int) -> int:
    kwargs = config.get("activation_fn_kwargs", dict, {})
    if config.values.get("k") is None and "k" in kwargs:
        config = _Reader(config.path, {"k": kwargs["k"]})
    k = config.count("k")
    if k > n_features:
        raise config.refuse(f"k is {k}, which is more than its {n_features} features")
    return k


def _normalisation(config: _Reader) -> Normalisation:
    said = config.values.get("normalize_activations")
    # before version 3 it was a bool
    said = {None: "none", False: "none", True: "expected_average_only_in"}.get(said, said)
    if said in NORMALISATIONS:
        return NORMALISATIONS[said]
    if said in ("expected_average_only_in", "covariance_whitening"):
        raise config.refuse(f"the factors of normalize_activations {said!r} are not in the folder; {WITH_SAELENS}")
    raise config.refuse(f"normalize_activations is {said!r}; {', '.join(NORMALISATIONS)} are done")


def _is_centred(config: _Reader, reads: Place | None, *, flat: bool) -> bool:
    """Whether it was trained on a model whose writes to the stream have no mean (as gpt2-small-res-jb)."""
    processed = config.get("model_from_pretrained_kwargs", dict)
    matters = reads is None or reads.point in CENTRED_POINTS
    if processed is None and flat and matters and str(config.get("model_name", str)).startswith("gpt2"):
        # three releases were, and only the list of releases in sae-lens says so
        raise config.refuse(
            "it does not say whether what GPT-2 writes was centred, as for gpt2-small-res-jb it was; `sightline sae "
            'convert RELEASE ID DIR` knows, or write "model_from_pretrained_kwargs": {"center_writing_weights": true} '
            "(or false) into it"
        )
    if not (processed or {}).get("center_writing_weights"):
        return False
    if reads is None:
        raise config.refuse("it was trained on centred writes (center_writing_weights), at a place that is not known")
    return matters


def _saelens_tensors(activation: Activation, skip: bool, d_in: int, n_features: int, d_out: int) -> dict[str, Stored]:
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, n_features),
        "W_dec": (n_features, d_out),
        "b_dec": (d_out,),
    }
    biases = {"gated": ["b_gate", "b_mag", "r_mag"], "jumprelu": ["b_enc", "threshold"]}.get(activation, ["b_enc"])
    tensors = {name: Stored(name, shape) for name, shape in shapes.items()}
    tensors |= {name: Stored(name, (n_features,)) for name in biases}
    return tensors | ({"W_skip": Stored("W_skip", (d_out, d_in), transposed=True)} if skip else {})


def sparsify_config(path: Path, values: dict[str, Any]) -> Config:
    """The config of a folder of eai-sparsify; its name is the module that it reads, as "layers.3.mlp".

    Raises:
        InvalidArgument: it asks for what is not done, or says nothing that makes sense; what to do.
    """
    config = _Reader(path, values)
    activation = config.get("activation", str, "topk")
    if activation != "topk":
        raise config.refuse(f"the activation {activation!r} is not done; topk is")
    for name in ("signed", "embed_skip", "gram_lookup"):
        if config.get(name, bool, False):
            raise config.refuse(f"{name} is true, which is not done")
    transcoder, skip = config.get("transcode", bool, False), config.get("skip_connection", bool, False)
    d_in = config.count("d_in")
    n_features = config.get("num_latents", int) or d_in * config.count("expansion_factor")
    name = path.parent.name
    module = _known(f"{name}.output")
    stored = {
        "W_enc": Stored("encoder.weight", (n_features, d_in), transposed=True),
        "b_enc": Stored("encoder.bias", (n_features,)),
        "W_dec": Stored("W_dec", (n_features, d_in)),
        "b_dec": Stored("b_dec", (d_in,)),
    }
    if skip:
        stored["W_skip"] = Stored("W_skip", (d_in, d_in), transposed=True)
    return Config(
        origin="sparsify",
        architecture="transcoder" if transcoder else "topk",
        activation="topk",
        n_features=n_features,
        d_in=d_in,
        d_out=d_in,
        stored=stored,
        reads=_known(f"{name}.input") if transcoder else module,
        writes=module,
        is_transcoder=transcoder,
        hook=name,
        k=_k(config, n_features),
        subtracts_b_dec=not transcoder,
    )


def _known(text: str) -> Place | None:
    try:
        return parse_place(text)
    except InvalidArgument:
        return None
