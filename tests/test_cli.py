"""The command `diva-lab` and the public names: quick to start, plain about mistakes."""

import resource
import subprocess
import sys

import pytest

from diva_lab.cli import EXPECTED, VERBS, main


def seconds(*words: str) -> tuple[float, subprocess.CompletedProcess]:
    """A Python process and its seconds of a core, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def help_of(verb: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_verb_with_a_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for verb, (text, *_) in VERBS.items():
        assert f"{verb} {text}" in printed


def test_an_unknown_verb_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune"])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and all(verb in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_answers_help_without_loading_a_model_library(verb):
    code = f"import sys, diva_lab.cli as cli\ntry: cli.main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
    taken, done = seconds("-c", code + "sys.exit('torch' in sys.modules)")
    assert done.returncode == 0 and f"usage: diva-lab {verb}" in done.stdout
    assert taken < 2


def test_the_package_is_imported_without_its_libraries_and_lists_its_public_names():
    code = "import time; t = time.process_time(); import diva_lab; print(time.process_time() - t, *dir(diva_lab))"
    taken, *names = seconds("-c", code)[1].stdout.split()
    assert float(taken) < 0.1
    assert {"tune", "align", "Settings", "preset", "evaluate", "load_encoder", "load_denoiser", "export"} <= set(names)


def test_every_public_name_is_what_it_says_and_another_one_is_refused():
    import diva_lab

    for name in diva_lab.__all__:
        assert getattr(diva_lab, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'tunes'; public names: .*tune"):
        diva_lab.tunes  # noqa: B018


def test_the_names_that_help_lists_are_those_of_the_registries(capsys):
    from diva_lab.benchmark import SCALES
    from diva_lab.evaluation.features import FEATURES, PRECISIONS
    from diva_lab.evaluation.table import BENCHMARKS

    words = help_of("evaluate", capsys).replace(",", " ").split()
    assert set(BENCHMARKS) | set(FEATURES) | set(PRECISIONS) <= set(words)
    assert set(SCALES) <= set(help_of("benchmark", capsys).replace(",", " ").replace(";", " ").split())


@pytest.mark.parametrize("error", EXPECTED)
def test_what_our_code_raises_of_bad_input_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    def fails(args):
        raise error("file x: found y; expected z")

    monkeypatch.setitem(VERBS, "presets", (*VERBS["presets"][:2], fails))
    assert main(["presets"]) == 2
    assert capsys.readouterr().err == "error: file x: found y; expected z\n"


def test_presets_lists_every_preset_and_prints_the_settings_of_one(capsys):
    from diva_lab.training.presets import PRESETS, preset_yaml

    assert main(["presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)
    assert main(["presets", "openai-l14-dcr"]) == 0
    assert capsys.readouterr().out.strip() == preset_yaml("openai-l14-dcr").strip()
    assert main(["presets", "openai-l14"]) == 2
    assert "unknown preset 'openai-l14'" in capsys.readouterr().err
