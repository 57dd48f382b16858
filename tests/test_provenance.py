import pytest

from diva_lab import provenance


@pytest.mark.parametrize("path", ["", "/nonexistent"])
def test_without_git_the_sha_is_unknown_and_the_rest_is_there(path, monkeypatch):
    monkeypatch.setenv("PATH", path)
    made = provenance.environment()
    assert made["git"] == "unknown" and made["versions"]["torch"]


def test_another_projects_repository_is_not_ours(tmp_path, monkeypatch):
    """A copy installed inside somebody's checkout has no sha of its own."""
    inside = provenance.ROOT / "diva_lab"  # git would answer here
    monkeypatch.setattr(provenance, "ROOT", inside)
    assert provenance.environment()["git"] == "unknown"
