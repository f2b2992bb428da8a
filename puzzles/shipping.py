"""Saving the embedded model as the folder that the repository carries."""

import json
import os
from pathlib import Path

_CONFIG_ODDITIES = ("_name_or_path", "max_window_layers", "attn_implementation", "_attn_implementation")


def save_model(model, tokenizer, out_dir: str | Path) -> None:
    """Write weights (readable by all, float32), config, generation config and tokenizer to ``out_dir``.

    Weights are replaced in one move: a reader sees the old file or the new one.
    """
    from safetensors.torch import save_file

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    partial = out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, out / "model.safetensors")
    _save_configs(model, tokenizer, out)


def _save_configs(model, tokenizer, out: Path) -> None:
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = json.loads(model.config.to_json_string(use_diff=True)) | {
        name: config[name] for name in ("head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings")
    }
    kept = {name: value for name, value in kept.items() if name not in _CONFIG_ODDITIES}
    kept["architectures"] = [type(model).__name__]
    _write_json(out / "config.json", kept)
    end = [model.config.eos_token_id, model.config.pad_token_id]
    _write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": end, "pad_token_id": end[1]})
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    _write_json(out / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
