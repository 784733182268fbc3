"""Find a checkpoint and read its configuration, in the same way for train, run and export. Imports no torch.

A checkpoint is given as a directory, as a directory that contains exactly one (a Trainer's output, a hub cache), or
as a name on a hub. A checkpoint that is not a model of the T5 family with a language-model head is refused here, from
its small files, before any tensor is opened.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.tokens import start_token_id

__all__ = ["FAMILY", "Checkpoint", "is_bundle", "is_student", "open_checkpoint", "weight_files"]

FAMILY = ("t5", "mt5", "umt5")
CARD = "sbs_edge.json"
ADAPTER = "adapter_config.json"

# In the order in which transformers looks for them; FSDP's whole state is accelerate's name for a .bin file.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)
_HEADS = (
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "T5WithLMHeadModel",  # the name of T5ForConditionalGeneration before transformers 3
)
_FROM_HUB = ("*.json", "*.model", "*.txt", "*.safetensors")
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found and accepted.

    Attributes:
        name: as the user wrote it, for messages.
        folder: holds ``config.json`` and the weights.
        config: the content of ``config.json``.
        adapter: directory of a LoRA adapter to merge into the weights, or None.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    adapter: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Return the directory with the tokenizer: the adapter's if it has one."""
        if self.adapter is not None and any(
            (self.adapter / name).is_file() for name in ("tokenizer.json", "spiece.model")
        ):
            return self.adapter
        return self.folder

    @property
    def start_id(self) -> int:
        """Return the decoder's first token; without one in the configuration, the padding token, as in T5."""
        return start_token_id(self.config)


def is_bundle(folder: Path) -> bool:
    """Return whether ``folder`` is a bundle or another output of export."""
    return (folder / "manifest.json").is_file() and not (folder / CARD).is_file()


def is_student(folder: Path) -> bool:
    """Return whether ``folder`` is a student directory or another checkpoint."""
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def open_checkpoint(name: str) -> Checkpoint:
    """Find the checkpoint ``name`` and check that it is of the T5 family and has a language-model head.

    Args:
        name: a directory, or a name on a hub.

    Raises:
        UsageError: there is none, it cannot be reached, or it is of another kind.
    """
    folder = _local(name)
    if folder is None:
        folder = _from_hub(name)
    if (folder / ADAPTER).is_file():
        return _with_adapter(name, folder)
    return Checkpoint(name, folder, _checked_config(folder))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in ``folder``, chosen by transformers' order of preference.

    Raises:
        UsageError: there is none, one of several is missing, or the index names a file outside the directory.
    """
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [part for part in parts if Path(part).name != part]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is damaged ({type(error).__name__}: {error}). Copy it again from where the checkpoint was saved."
            ) from error
        if outside:
            raise UsageError(
                f"{path} names the file {outside[0]!r}, which is not in its directory. Files outside it are not opened."
            )
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise UsageError(
                f"{path} names {len(parts)} files, and {_few(missing)} of them are missing. Copy the checkpoint again, "
                "with every file."
            )
        return [folder / part for part in parts]
    raise UsageError(_no_weights(folder))


# ---------------------------------------------------------------------- finding it


def _local(name: str) -> Path | None:
    """Return the directory of the checkpoint ``name``; None: it is a name on a hub.

    Raises:
        UsageError: ``name`` is a path without a checkpoint.
    """
    given = Path(name).expanduser()
    if given.is_dir():
        return _inside(given)
    if given.is_file():
        raise UsageError(
            f"{name} is a file. Give the directory that holds it, with config.json and a tokenizer beside it."
        )
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        beside = given.parent
        # ORGANISATION/NAME is a hub's form, unless a directory of that name is here.
        if beside == Path() or not beside.is_dir():
            near = _near(given)
            if near and beside == Path() and "/" not in name:
                return _not_there(given, near)
            return None
    return _not_there(given, _near(given))


def _near(given: Path) -> list[str]:
    parent = given.parent
    if not parent.is_dir():
        return []
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    return [str(parent / name) for name in difflib.get_close_matches(given.name, names, 3, 0.75)]


def _not_there(given: Path, near: list[str]) -> Path:
    parent = given.parent
    while not parent.is_dir():
        parent = parent.parent
    hint = f"Is it {' or '.join(near)}?" if near else f"The part of it that is there is {parent}."
    raise UsageError(f"There is no directory {given}. {hint}")


def _inside(folder: Path) -> Path:
    """Return ``folder``, or the only checkpoint inside it.

    Raises:
        UsageError: there is none, several, or something else.
    """
    if (folder / "config.json").is_file() or (folder / ADAPTER).is_file():
        if is_bundle(folder):
            raise UsageError(_bundle_message(folder))
        return folder
    if is_bundle(folder):
        raise UsageError(_bundle_message(folder))
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        return _snapshot(folder, snapshots)
    saved = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    whole = sorted(
        (path for path in saved if (path / "config.json").is_file() or (path / ADAPTER).is_file()),
        key=lambda path: path.name,
    )
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UsageError(
            f"{folder} has {len(whole)} checkpoints of a training run: {_few([path.name for path in whole])}. Choose "
            f"one, such as {whole[-1]}."
        )
    if saved and (folder / "run.json").is_file():
        raise UsageError(
            f"{folder} has an unfinished training run, not a student. Finish it with the command that "
            f"started it and resume=True; the student is then {folder.with_suffix('')}."
        )
    caches = sorted(path for path in folder.glob("models--*") if (path / "snapshots").is_dir())
    caches = caches or sorted(path for path in folder.glob("hub/models--*") if (path / "snapshots").is_dir())
    if caches:
        raise UsageError(
            f"{folder} is a hub cache with {len(caches)} model(s). Choose one: "
            f"{_few([str(path) for path in caches])}."
        )
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and is_student(path))
    if inner:
        raise UsageError(
            f"{folder} has no config.json; the checkpoint(s) in it are {_few([str(path) for path in inner])}. Choose "
            "one."
        )
    found = sorted(path.name for path in folder.iterdir())
    raise UsageError(
        f"{folder} is not a checkpoint: it has no config.json ({'it holds ' + _few(found) if found else 'it is empty'}). "
        "Give the directory that training or save_pretrained wrote."
    )


def _snapshot(folder: Path, snapshots: Path) -> Path:
    """Return the snapshot that a hub's cache calls main, or its only one."""
    kept = sorted(path for path in snapshots.iterdir() if (path / "config.json").is_file())
    named = folder / "refs" / "main"
    if named.is_file():
        revision = named.read_text(encoding="utf-8").strip()
        for path in kept:
            if path.name == revision:
                return path
    if len(kept) == 1:
        return kept[0]
    if not kept:
        raise UsageError(
            f"{folder} is a hub cache of a model that was never downloaded completely: it has no config.json."
        )
    raise UsageError(f"{folder} has {len(kept)} revisions. Choose one: {_few([str(p) for p in kept])}.")


def _from_hub(name: str) -> Path:
    """Download the checkpoint ``name``, or find it in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(f"There is no directory {name}.") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_FROM_HUB]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_FROM_HUB, "pytorch_model*.bin"]))
    except Exception as error:  # the library's and its HTTP client's errors have no common class
        first = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
        raise UsageError(
            f"There is no directory {name}, and the hub gave no checkpoint of that name "
            f"({type(error).__name__}: {first}). Check the spelling, or download it where the hub can be reached and "
            "give the directory."
        ) from error
    if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise UsageError(f"The hub's {name} has no config.json, so it is not a checkpoint of transformers.")
    return folder


# ---------------------------------------------------------------------- its configuration


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. Copy it again from where the checkpoint was saved."
        ) from error
    return content


def _checked_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "config.json")
    family = config.get("model_type")
    if family not in FAMILY:
        raise UsageError(
            f"{folder} is a {family!r} model, but students are of the T5 family (model types {', '.join(FAMILY)}; "
            "T5 v1.1, FLAN-T5 and ByT5 are t5)."
        )
    named = config.get("architectures") or []
    other = [name for name in named if name not in _HEADS] if isinstance(named, list) else [str(named)]
    if other:
        raise UsageError(
            f"{folder / 'config.json'} says that the checkpoint is a {other[0]}, which does not write text. A student "
            f"has a language-model head: use a checkpoint saved by {_HEADS[0]}, or by its mT5 or UMT5 form."
        )
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        method = kind.get("quant_method") if isinstance(kind, dict) else None
        raise UsageError(
            f"{folder} has weights quantised by {method or 'another tool'}, without the precision that training and export "
            "need. Use the checkpoint that it was made from; export quantises by itself (target cpu-int8)."
        )
    return config


def _with_adapter(name: str, folder: Path) -> Checkpoint:
    """Return the checkpoint that an adapter was trained on, and the adapter.

    Raises:
        UsageError: the base cannot be found, or it is not clear which model is meant.
    """
    settings = _json(folder / ADAPTER)
    base = settings.get("base_model_name_or_path")
    if (folder / "config.json").is_file() and any((folder / file).is_file() for file in WEIGHTS):
        raise UsageError(
            f"{folder} has both a whole model and a LoRA adapter ({ADAPTER}, trained on {base}), so it is not clear "
            "whether the adapter is already merged into the weights. For the model alone, move the files adapter_* "
            f"away: mkdir {folder}.adapter && mv {folder}/adapter_* {folder}.adapter/ . To merge the adapter into "
            f"its base, give {folder}.adapter after that."
        )
    if settings.get("peft_type") != "LORA":
        raise UsageError(
            f"{folder} has a {settings.get('peft_type')} adapter; only LoRA adapters can be merged into the weights."
        )
    if not base:
        raise UsageError(
            f"{folder / ADAPTER} does not say which checkpoint it was trained on. Write its directory as "
            "base_model_name_or_path there."
        )
    beside = folder / str(base)
    try:
        inner = open_checkpoint(str(beside) if beside.is_dir() else str(base))
    except UsageError as error:
        raise UsageError(
            f"{folder} is a LoRA adapter, and its base cannot be opened: {error} Its path is "
            f"base_model_name_or_path in {folder / ADAPTER}."
        ) from error
    if inner.adapter is not None:
        raise UsageError(
            f"{folder} is an adapter of an adapter ({inner.adapter}). Merge the inner one first."
        )
    return Checkpoint(name, inner.folder, inner.config, folder)


def _no_weights(folder: Path) -> str:
    """Return why ``folder`` has no readable weights, and the commands that create them."""
    script = folder / "zero_to_fp32.py"
    steps = sorted(path.name for path in folder.glob("global_step*"))
    if script.is_file() or steps:
        form = "." if script.is_file() and "output_dir" in script.read_text(errors="replace") else WEIGHTS[2]
        run = f"cd {folder} && python zero_to_fp32.py . {form}"
        if not script.is_file():
            run = f"python -m deepspeed.utils.zero_to_fp32 {folder} {folder}"
        return (
            f"{folder} holds weights in the shards of DeepSpeed ({', '.join(steps) or 'zero_to_fp32.py'}). Put them "
            f"together where deepspeed is installed, and give the directory again: {run}"
        )
    shards = sorted(folder.glob("pytorch_model_fsdp_*"))
    if shards:
        return (
            f"{folder} holds weights in the shards of FSDP ({shards[0].name}). Put them together and give the directory "
            f"again: accelerate merge-weights {shards[0]} {folder}"
        )
    flax, keras = (folder / "flax_model.msgpack").is_file(), (folder / "tf_model.h5").is_file()
    if flax or keras:
        kind, flag = ("Flax", "from_flax") if flax else ("TensorFlow", "from_tf")
        return (
            f"{folder} holds {kind}'s weights alone. Convert them where transformers 4 and {kind} are installed: "
            f'python -c "from transformers import AutoModelForSeq2SeqLM as M; M.from_pretrained({str(folder)!r}, '
            f'{flag}=True).save_pretrained({str(folder)!r})"'
        )
    found = sorted(path.name for path in folder.iterdir())
    return (
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts (it holds "
        f"{_few(found)}). Copy the checkpoint again, with every file."
    )


def _bundle_message(folder: Path) -> str:
    return (
        f"{folder} is a bundle, which cannot be trained, evaluated or exported. Give the student directory that it was "
        "exported from; sbs-edge predict answers with the bundle."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
