"""tests/gpu/prove, whose minutes on a GPU are few: it keeps to them, and loses no result."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "gpu"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder of parts, with a piece in the first, and one that begins there and ends in a later one."""
    from parts import pack

    for name, size in {"rtx": 600, "ort": 5000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}.py").write_bytes(os.urandom(size))
    sizes = pack({name: tmp_path / name for name in ("rtx", "ort")}, tmp_path / "parts", largest=3000)
    parts = {path.name: path.stat().st_size for path in (tmp_path / "parts").glob("part*")}
    assert sum(parts.values()) == sum(sizes.values())
    assert max(parts.values()) == parts["part1"] == 3000 > sizes["rtx"]
    return tmp_path / "parts"


def test_a_piece_is_there_as_soon_as_its_parts_are(filled: Path, tmp_path: Path) -> None:
    from parts import Parts

    last = filled / "part2"
    last.rename(tmp_path / "on its way")
    there = Parts(filled, tmp_path / "arrived")
    assert there.missing("rtx") is None
    assert there.missing("ort") == "ort: part2 not arrived"
    last.write_bytes(b"\0" * 100)
    assert "is damaged, or of another filling" in str(there.missing("ort"))
    (tmp_path / "on its way").rename(last)
    assert there.missing("ort") is None
    for name in ("rtx", "ort"):
        arrived = tmp_path / "arrived" / name / f"of_{name}.py"
        assert arrived.read_bytes() == (tmp_path / name / arrived.name).read_bytes()
    assert there.missing("data") == "data: it is not among rtx, ort"
    assert "contents.json" in str(Parts(tmp_path / "nowhere", tmp_path / "other").missing("rtx"))
    for damaged in ("[]", "{}", '{"part": 3000, "pieces": {"rtx": {}}}', '{"part"'):
        (filled / "contents.json").write_text(damaged)
        assert "contents.json" in str(Parts(filled, tmp_path / "other").missing("rtx"))


def test_a_filling_replaces_an_earlier_one_and_nothing_else(filled: Path, tmp_path: Path) -> None:
    from parts import Parts, pack

    for name in ("notes.txt", "part1.txt"):
        (filled / name).touch()
    pack({"rtx": tmp_path / "rtx"}, filled)
    assert {path.name for path in filled.iterdir()} == {"contents.json", "part1", "notes.txt", "part1.txt"}
    assert Parts(filled, tmp_path / "arrived").missing("rtx") is None


def _entry(kind: int, architecture: int, code: bytes) -> bytes:
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), architecture) + code


def test_a_pruned_library_has_the_code_of_one_gpu_and_of_what_lacks_it(
    compile_library: Callable[..., Path], tmp_path: Path
) -> None:
    from prune import prune

    codes = {name: bytes([number]) * 24 for number, name in enumerate(("80", "90", "ptx", "only 80"), 101)}
    contents = _entry(2, 80, codes["80"]) + _entry(2, 90, codes["90"]) + _entry(1, 90, codes["ptx"])
    other = _entry(2, 80, codes["only 80"])
    section = b"".join(
        struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(each)) + each + bytes(8) for each in (contents, other)
    )
    text = ",".join(map(str, section))
    source = f'__attribute__((used, section(".nv_fatbin"))) const unsigned char code[] = {{{text}}};'
    library = compile_library("libcode.so", source)
    before = library.read_bytes()
    assert prune(library, tmp_path / "pruned.so", 90) == 48
    after = (tmp_path / "pruned.so").read_bytes()
    assert after == before.replace(codes["80"], bytes(24)).replace(codes["ptx"], bytes(24))
    assert codes["90"] in after
    assert codes["only 80"] in after


@pytest.fixture
def prover(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """prover(seconds): one on a machine with a GPU, as it believes."""
    import proving

    monkeypatch.setattr(proving, "_DEVICE", 'print(\'{"name": "a GPU", "architecture": "90"}\')')
    monkeypatch.setattr(proving, "_GRACE", 0.5)
    return lambda seconds: proving.Prover(tmp_path / "work", tmp_path / "out", filled, seconds)


def _python(text: str) -> tuple[str, ...]:
    return ("python", "-c", text)


def test_every_step_ends_in_a_result(prover: Callable[..., Any], filled: Path, tmp_path: Path) -> None:
    from proving import Step

    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    late = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    (filled / "part2").unlink()
    steps = {
        "right": Step("right", 60, _python("print('fine {architecture}')"), ("rtx",)),
        "wrong": Step("wrong", 60, _python("print('as it says'); raise SystemExit(7)")),
        "long": Step("long", 1, (*_python(f"print('begun', flush=True); {child}"), late)),
        "early": Step("early", 60, _python(""), ("ort",)),
        "unbuilt": Step("unbuilt", 60, _python(""), ("libraries",)),
        "absent": Step("absent", 60, ("no-such-profiler",)),
        "nothing": Step("nothing", 60, (*_python("print('5 skipped in 1 s')"), "pytest")),
    }
    proves = prover(600)
    begin = time.monotonic()
    found = {name: proves.prove(step) for name, step in steps.items()}
    assert {name: (outcome.state, outcome.said) for name, outcome in found.items()} == {
        "right": ("passed", "fine 90"),
        "wrong": ("failed", "exit code 7: as it says"),
        "long": ("stopped", "after 1 s, at: begun"),
        "early": ("skipped", "ort: part2 not arrived"),
        "unbuilt": ("skipped", "the libraries are not built"),
        "absent": ("skipped", "no-such-profiler is not installed"),
        "nothing": ("skipped", "5 skipped in 1 s"),
    }
    assert time.monotonic() - begin < 30
    for name, outcome in found.items():
        facts = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert (facts["state"], facts["device"]["name"]) == (outcome.state, "a GPU")
    again = {name: prover(600).prove(steps[name]).said for name in ("right", "wrong")}
    assert again == {"right": "before, with these sources", "wrong": "exit code 7: as it says"}
    assert prover(600).prove(steps["right"], again=True).said == "fine 90"
    assert prover(1).prove(steps["wrong"]).said == "no time is left"
    time.sleep(max(0.0, begin + 4 - time.monotonic()))
    assert not (tmp_path / "alive").exists(), "what a stopped step has started runs on"


def test_wheels_that_were_installed_in_part_are_installed_again(
    prover: Callable[..., Any], filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parts import pack

    names = ("not_here", "not_there")
    (tmp_path / "wheels").mkdir()
    for name in names:
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    pack({"wheels": tmp_path / "wheels"}, filled)
    whole = zipfile.ZipFile.extractall

    def interrupted(archive: zipfile.ZipFile, *arguments: Any) -> None:
        whole(archive, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "extractall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prover(600)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", whole)
    prover(600)
    assert {path.stem for path in (tmp_path / "work" / "site").iterdir()} == set(names)


def test_the_steps_are_well_formed() -> None:
    from proving import STEPS

    assert len({step.name for step in STEPS}) == len(STEPS) > 10
    for step in STEPS:
        for word in (*step.command, *(step.without if isinstance(step.without, tuple) else ())):
            if word.endswith(".py") or word.startswith("benchmarks/"):
                assert (FOLDER.parents[1] / word).exists(), word


def test_results_do_not_go_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([FOLDER / "prove", "--out", tmp_path / "file"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"tests/gpu/prove: cannot make the folder {tmp_path / 'file'}: File exists\n"


@pytest.mark.slow
def test_without_a_gpu_each_step_runs_a_little_or_says_why_not(require: Callable[[str], None], tmp_path: Path) -> None:
    for name in ("ort", "native", "compiler", "trt-headers", "trt-rtx"):
        require(name)
    folders = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--parts", tmp_path / "parts"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "PYTEST_ADDOPTS": ""}
    done = subprocess.run([FOLDER / "prove", *folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    states = {name: words[0] for name, words in lines.items()}
    ran = {"kernels", "plugin", "rtx", "networks", "study"}
    assert states == {path.stem: "passed" if path.stem in ran else "skipped" for path in _results(tmp_path / "out")}
    assert all("torch finds no CUDA device" in " ".join(lines[name]) for name in states if name not in ran)


def _results(folder: Path) -> list[Path]:
    from proving import STEPS

    return [folder / f"{step.name}.json" for step in STEPS]
