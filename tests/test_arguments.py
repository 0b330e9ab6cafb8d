"""Flags, presets and YAML files: who wins, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from di4c_ext import arguments
from di4c_ext.arguments import UsageError, parse


@dataclass
class Settings:
    num_latents: int = field(default=16, metadata={"help": "latents"})
    learning_rate: float = 1e-3
    control_variate: bool = True
    names: list[int] = field(default_factory=lambda: [1])
    extra: dict[str, Any] | str | None = None
    output_dir: str = "out"


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "digits.yaml").write_text("num_latents: 4\nlearning_rate: 1e-2\nextra: {a: 1}\n")
    (folder / "pixels.yaml").write_text("num_latents: 64\n")
    monkeypatch.setattr(arguments, "PRESETS", folder)
    return folder


def _parse(*argv: str, **kwargs: Any) -> tuple[Settings, dict[str, Any]]:
    (settings,), stored = parse("test", [Settings], argv, default_preset="digits", **kwargs)
    return settings, stored


def test_flags_beat_the_file_beats_the_preset_beats_the_default(presets: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("num_latents: 8\ncontrol_variate: false\nnames: [1, 2]\n")
    settings, stored = _parse("--config", str(file), "--num-latents", "9")
    assert settings == Settings(9, 1e-2, False, [1, 2], '{"a": 1}')
    assert stored == {
        "num_latents": 9,
        "learning_rate": "1e-2",
        "control_variate": False,
        "names": [1, 2],
        "extra": {"a": 1},
    }
    again = tmp_path / "stored.yaml"
    again.write_text(arguments.as_yaml(stored))
    assert _parse("--config", str(again))[0] == settings


def test_preset_by_flag_or_by_file(presets: Path, tmp_path: Path) -> None:
    assert _parse("--preset", "pixels")[0].num_latents == 64
    file = tmp_path / "mine.yaml"
    file.write_text("preset: pixels\n")
    assert _parse("--config", str(file))[0].num_latents == 64
    assert _parse("--config", str(file), "--preset", "digits")[0].num_latents == 4


def test_resumed_run_starts_from_what_it_was_told(presets: Path) -> None:
    @dataclass
    class Resumable(Settings):
        resume: bool = False

    def stored(early: Any) -> dict[str, Any]:
        assert early.output_dir == "there"
        return {"learning_rate": 0.5, "preset": "pixels"}

    def run(*argv: str) -> Resumable:
        return parse("test", [Resumable], ["--output_dir", "there", *argv], default_preset="digits", stored=stored)[0][
            0
        ]

    assert (run().num_latents, run().learning_rate) == (4, 1e-2)
    assert (run("--resume").num_latents, run("--resume").learning_rate) == (64, 0.5)
    assert run("--resume", "--learning_rate", "0.25").learning_rate == 0.25


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_latent", "3"], "unknown flag '--num_latent'; did you mean '--num_latents'"),
        (["--num_latent=3"], "unknown flag '--num_latent'"),
        (["--xyzzy"], "unknown flag '--xyzzy'$"),
        (["oops"], "unexpected argument 'oops'"),
        (["--num_latents", "many"], "invalid int value: 'many'"),
        (["--num_latents"], "expected one argument"),
        (["--preset", "digit"], "unknown preset 'digit'; did you mean 'digits'.; known presets: digits, pixels"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: No such file"),
    ],
)
def test_refuses_flags(presets: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_latent: 3", "unknown key 'num_latent' in .*mine.yaml; did you mean 'num_latents'"),
        ("num_latents: [1, 2]", "'num_latents': takes one value"),
        ("num_latents: many", "invalid int value: 'many'"),
        ("- num_latents", "holds a list"),
        ("a: b: c", "not YAML"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_refuses_files(presets: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        _parse("--config", str(file))


def test_help_names_every_flag(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--num_latents" in shown and "--preset" in shown and "--config" in shown


def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Any) -> int:
        raise UsageError("--num_steps 0: must be at least 1")

    with pytest.raises(SystemExit) as stop:
        arguments.run(main, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --num_steps 0: must be at least 1\n"
    with pytest.raises(SystemExit) as stop:
        arguments.run(lambda argv: 0, [])
    assert stop.value.code == 0


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    def main(argv: Any) -> int:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        arguments.run(main, [])


def test_shipped_presets_are_known_to_their_commands() -> None:
    assert {"digits", "digits_smoke"} <= set(arguments.preset_names())
