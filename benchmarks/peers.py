"""Attribution against TransformerLens and captum: one attribution step for `lm_head`, and what is kept of a sample.

The step: the integrated gradient of the answer's log-probability (4 Gauss–Legendre points, final norm frozen, softmax
over the vocabulary) with respect to the final stream at the position that predicts it, times what every head and every
MLP wrote there: 8 × (8 + 1) numbers.

1. TransformerLens gives the parts (`run_with_cache`, `stack_head_results`, `stack_activation`); it has no integrated
   gradients, so the gradient is eight lines of torch here. The same numbers come out, which is checked.
2. captum's layer attributions at the same sites (input of each output projection, each MLP) go through the rest of the
   model: the total effect of a part, not its direct one. Where nothing is downstream (the MLP of the last layer), its
   gradient × activation is ours, which is checked.
3. captum's `IntegratedGradients` on a read-out of all parts, which a user has to write, gives our numbers again, which
   is checked.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from benchmarks.subject import DATASET, TOKENS, Subject, token_ids
from benchmarks.table import Row
from benchmarks.timing import Prepared, Times, Work, in_turn, milliseconds, ratio

ANSWER = TOKENS - 1
AT = ANSWER - 1
NOTE = (
    "The step: 4-point integrated gradient of the answer's log-probability at one position, times what each of 64 "
    "heads and 8 MLPs wrote there; the numbers of TransformerLens and of captum's read-out are checked to be ours. "
    "TransformerLens runs with its default options and keeps no autograd graph; its gradient is plain torch. captum's "
    "layer attributions give total effects (through the rest of the model) at 16 sites, the input of each output "
    "projection and each MLP: integrated ones take one run per site, gradient × activation one call for all inputs and "
    "one for all outputs. The read-out is a function of all parts at hand, written for this benchmark, under captum's "
    "`IntegratedGradients`. In a cell: theirs first, then ours."
)


def run(subject: Subject, rounds: int) -> list[Row]:
    """All rows."""
    sample = subject.forward()
    lens, captum = Lens(subject), Captum(subject)
    _check(subject, sample, lens, captum)
    return [
        _bytes(subject, sample, lens),
        *_lens(subject, sample, lens, rounds),
        *_captum(subject, sample, captum, rounds),
    ]


class Lens:
    """TransformerLens on a copy of the model."""

    def __init__(self, subject: Subject) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
        model.requires_grad_(False)
        self.bridge = TransformerBridge.boot_transformers(
            str(subject.folder), hf_model=model, tokenizer=subject.tokenizer, dtype=torch.float32
        )
        self.ids = torch.tensor([token_ids(TOKENS, subject.vocabulary)])
        self.layers, self.label = len(model.model.layers), int(self.ids[0, ANSWER])
        self.weight, self.eps = model.model.norm.weight.detach(), model.config.rms_norm_eps
        self.unembedding = model.lm_head.weight.detach()

    @torch.no_grad()
    def cache(self) -> Any:
        """`run_with_cache` as it comes."""
        return self.bridge.run_with_cache(self.ids)[1]

    @torch.no_grad()
    def parts(self) -> Any:
        """The same with nothing but what the step needs."""
        wanted = ("attn.hook_z", "hook_mlp_out", f"blocks.{self.layers - 1}.hook_resid_post")
        return self.bridge.run_with_cache(self.ids, names_filter=lambda name: name.endswith(wanted))[1]

    @torch.no_grad()
    def step(self, cache: Any, steps: int = 4) -> Tensor:
        """[layers, heads + 1], from a cache."""
        grad = self.gradient(cache["resid_post", self.layers - 1][0, AT], steps)
        heads = cache.stack_head_results(pos_slice=AT)[:, 0] @ grad
        mlps = cache.stack_activation("mlp_out")[:, 0, AT] @ grad
        return torch.cat([heads.view(self.layers, -1), mlps[:, None]], dim=1)

    def gradient(self, x: Tensor, steps: int) -> Tensor:
        """The integrated gradient at the final stream; plain torch."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        scale = self.weight / (x.square().mean() + self.eps).sqrt()
        alphas, weights = torch.tensor((nodes + 1) / 2).to(x), torch.tensor(weights / 2).to(x)
        with torch.enable_grad():
            rows = (alphas[:, None] * x).requires_grad_()
            value = ((scale * rows) @ self.unembedding.T).log_softmax(-1)[:, self.label] @ weights
            (grad,) = torch.autograd.grad(value, rows)
        return grad.sum(0)


class FrozenNorm(torch.nn.Module):
    """The final norm with its scale held, as ours is; in captum's models it takes the place of the norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Ñ(x)."""
        return self.weight * x / (x.detach().square().mean(-1, keepdim=True) + self.eps).sqrt()


class Captum:
    """captum on a copy of the model whose final norm is frozen."""

    def __init__(self, subject: Subject) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.model.model.norm = FrozenNorm(self.model.model.norm)
        self.ids = torch.tensor([token_ids(TOKENS, subject.vocabulary)])
        self.label = int(self.ids[0, ANSWER])
        layers = self.model.model.layers
        self.projections, self.mlps = [one.self_attn.o_proj for one in layers], [one.mlp for one in layers]
        self.kept = self._keep()

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """[row, vocabulary] at the position that predicts the answer."""
        return self.model(ids, use_cache=False).logits[:, AT].log_softmax(-1)

    def integrated(self) -> None:
        """`LayerIntegratedGradients` at the 16 sites, one after the other."""
        for sites, at_input in ((self.projections, True), (self.mlps, False)):
            for site in sites:
                attributor = LayerIntegratedGradients(self.log_probabilities, site)
                attributor.attribute(self.ids, target=self.label, n_steps=4, attribute_to_layer_input=at_input)

    def gradient_x_activation(self) -> list[Tensor]:
        """`LayerGradientXActivation` at the 16 sites, in one call for the projections' inputs and one for the MLPs."""
        found = []
        for sites, at_input in ((self.projections, True), (self.mlps, False)):
            attributor = LayerGradientXActivation(self.log_probabilities, sites)
            found += attributor.attribute(self.ids, target=self.label, attribute_to_layer_input=at_input)
        return [one[0] if isinstance(one, tuple) else one for one in found]

    def read_out(self) -> Tensor:
        """[layers, heads + 1] by `IntegratedGradients`, from z, MLP outputs and the embedding at the position."""
        z, mlps, embedding = self.kept
        weights = torch.stack([one.weight.T.view(*z.shape[1:], -1) for one in self.projections])
        heads = torch.einsum("lhd,lhde->lhe", z, weights)
        x = embedding + heads.sum((0, 1)) + mlps.sum(0)
        scale = self.model.model.norm.weight / (x.square().mean() + self.model.model.norm.eps).sqrt()

        def log_probabilities(embedding: Tensor, heads: Tensor, mlps: Tensor) -> Tensor:
            stream = embedding + heads.sum((1, 2)) + mlps.sum(1)
            return ((scale * stream) @ self.model.lm_head.weight.T).log_softmax(-1)

        inputs = (embedding[None], heads[None], mlps[None])
        _, at_heads, at_mlps = IntegratedGradients(log_probabilities).attribute(inputs, target=self.label, n_steps=4)
        return torch.cat([at_heads[0].sum(-1), at_mlps[0].sum(-1)[:, None]], dim=1)

    @torch.no_grad()
    def _keep(self) -> tuple[Tensor, Tensor, Tensor]:
        z, mlps, embedding = [], [], []
        hooks = [
            self.model.model.embed_tokens.register_forward_hook(lambda _, given, out: embedding.append(out[0, AT]))
        ]
        for projection, mlp in zip(self.projections, self.mlps, strict=True):
            hooks.append(projection.register_forward_hook(lambda _, given, out: z.append(given[0][0, AT])))
            hooks.append(mlp.register_forward_hook(lambda _, given, out: mlps.append(out[0, AT])))
        self.log_probabilities(self.ids)
        for hook in hooks:
            hook.remove()
        return (
            torch.stack(z).unflatten(-1, (self.model.config.num_attention_heads, -1)),
            torch.stack(mlps),
            embedding[0],
        )


def step(subject: Subject, sample: int, steps: int = 4) -> Tensor:
    """Ours: [layers, heads + 1]."""
    session = subject.session
    label = token_ids(TOKENS, subject.vocabulary)[ANSWER]
    grad = session.compute_node_gradient(DATASET, sample, "lm_head", 8, pos_ids=[AT], labels=[label], steps=steps)
    return session.attribute_residual(DATASET, sample, [AT], [grad], [8.0])[..., 0]


def _whole(subject: Subject) -> Tensor:
    return step(subject, subject.forward())


def _check(subject: Subject, sample: int, lens: Lens, captum: Captum) -> None:
    """What is compared is the same."""
    ours = step(subject, sample)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)
    close(lens.step(lens.cache()), ours)
    close(lens.step(lens.parts()), ours)
    close(captum.read_out().float(), ours)
    last_mlp = captum.gradient_x_activation()[-1]
    close(last_mlp.sum().float(), step(subject, sample, 0)[-1, -1])


def _lens(subject: Subject, sample: int, lens: Lens, rounds: int) -> list[Row]:
    again = lens.cache()
    lens.step(again)
    works: dict[str, Work | Prepared] = {
        "stored": partial(step, subject, sample),
        "cached": Prepared(lens.cache, lens.step),
        "again": lambda: lens.step(again),
        "whole": partial(_whole, subject),
        "whole lens": lambda: lens.step(lens.cache()),
        "whole parts": lambda: lens.step(lens.parts()),
    }
    times = in_turn(works, rounds)
    return [
        _faster(
            "lm_head step from a stored sample, times faster than TransformerLens from its cache",
            "≥ 3",
            times,
            "cached",
            "stored",
        ),
        _faster("the same, once TransformerLens has its head results (32 MiB more)", "", times, "again", "stored"),
        _faster(
            "with the forward that stores or caches, times faster than TransformerLens",
            "≥ 3",
            times,
            "whole lens",
            "whole",
        ),
        _faster("the same, TransformerLens caching the parts only", "", times, "whole parts", "whole"),
    ]


def _captum(subject: Subject, sample: int, captum: Captum, rounds: int) -> list[Row]:
    works: dict[str, Work | Prepared] = {
        "stored": partial(step, subject, sample),
        "whole": partial(_whole, subject),
        "gradient": captum.gradient_x_activation,
        "read-out": captum.read_out,
        "integrated": captum.integrated,
    }
    times = in_turn(works, rounds)
    layers = "captum's layer integrated gradients, 16 sites"
    return [
        _faster(f"lm_head step with its forward, times faster than {layers}", "≥ 10", times, "integrated", "whole"),
        _faster(f"lm_head step from a stored sample, times faster than {layers}", "", times, "integrated", "stored"),
        _faster(
            "lm_head step with its forward, times faster than captum's gradient × activation, 16 sites",
            "",
            times,
            "gradient",
            "whole",
        ),
        _faster(
            "lm_head step from a stored sample, times faster than captum's gradient × activation",
            "",
            times,
            "gradient",
            "stored",
        ),
        _faster(
            "lm_head step from a stored sample, times faster than captum on the read-out",
            "",
            times,
            "read-out",
            "stored",
        ),
    ]


def _faster(name: str, aim: str, times: Times, base: str, ours: str) -> Row:
    return Row(name, aim, ratio(times, base, ours), milliseconds(times[base], times[ours]))


def _bytes(subject: Subject, sample: int, lens: Lens) -> Row:
    """What is kept of a sample; of TransformerLens' cache every storage counts once."""
    ours = subject.session.sample(DATASET, sample).layout.path.stat().st_size
    cache = lens.cache()
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in cache.cache_dict.values()}
    theirs = sum(storages.values())
    measured = f"{theirs / 2**20:.1f}, {ours / 2**20:.1f} MiB"
    return Row(
        "bytes stored per sample against the distinct storage of TransformerLens' cache",
        "≤ 0.125",
        ours / theirs,
        measured,
    )
