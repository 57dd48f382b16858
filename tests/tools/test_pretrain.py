import pytest

from diva_lab.world import World
from tools import pretrain


@pytest.fixture
def calls(monkeypatch):
    """The calls of `pretrain.main`, in order; nothing is trained."""
    calls = []
    for name in ("clip", "vae", "diffusion"):
        monkeypatch.setattr(
            pretrain, f"pretrain_{name}", lambda *args, _name=name, **more: calls.append((_name, *args, more))
        )
    monkeypatch.setattr(pretrain, "write_pairs", lambda *_: calls.append(("pairs",)))
    monkeypatch.setattr(pretrain, "write_record", lambda *_, **__: None)
    return calls


def test_models_of_another_world_are_made_in_their_folder_and_leave_the_shipped_pairs(calls, tmp_path):
    pretrain.main(["models", "--world", "2", "--sight", "0.01", "--out", str(tmp_path)])
    assert [call[0] for call in calls] == ["clip", "vae", "diffusion"]
    assert calls[0] == ("clip", tmp_path / "clip", World(2), 0, {"p": 0.01})
    assert all(call[1:] == (tmp_path / "diffusion", World(2), 0, {}) for call in calls[1:])


def test_one_part_is_made_alone(calls, tmp_path):
    pretrain.main(["clip", "--out", str(tmp_path)])
    assert calls == [("clip", tmp_path / "clip", World(0), 0, {"p": pretrain.SIGHT})]


def test_all_makes_the_shipped_pairs_too(calls, tmp_path):
    pretrain.main(["all", "--out", str(tmp_path)])
    assert [call[0] for call in calls] == ["clip", "vae", "diffusion", "pairs"]
