"""Shipped files are found from any folder, and copied to a project that a user can edit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.core.errors import ConfigError, guard
from fine_dist.core.resources import SHIPPED, resource
from fine_dist.core.yaml_files import load_yaml
from fine_dist.init_project import main


def test_every_shipped_folder_is_the_repository_s_own():
    root = Path(__file__).resolve().parents[2]
    for name in SHIPPED:
        assert resource(name).resolve() == root / name
    assert resource("configs/condense/dit_b.yaml").is_file()


@pytest.mark.parametrize("name", ["configs/none.yaml", "tests/conftest.py", "configs/../setup.cfg", ""])
def test_what_is_not_shipped_is_refused(name):
    with pytest.raises(ConfigError, match="not among the shipped files"):
        resource(name)


def test_a_shipped_config_is_read_where_the_folder_has_none_and_the_folder_s_own_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_yaml("configs/condense/dit_b.yaml")
    (tmp_path / "configs" / "condense").mkdir(parents=True)
    (tmp_path / "configs" / "condense" / "dit_b.yaml").write_text("steps: 7\n")
    assert load_yaml("configs/condense/dit_b.yaml") == {"steps": 7}
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml("configs/condense/none.yaml")


def test_init_project_copies_what_a_user_edits_and_leaves_edited_files_alone(tmp_path, capsys):
    assert main([str(tmp_path / "project")]) == 0
    said = capsys.readouterr().out
    assert "files written" in said and "sbatch slurm/condense.sh" in said
    project = tmp_path / "project"
    assert (project / "slurm" / "condense.sh").stat().st_mode & 0o100  # still a script
    assert (project / "slurm" / "site.sh").read_text() == (project / "slurm" / "site.example.sh").read_text()
    (project / "slurm" / "site.sh").write_text("PARTITION=mine\n")
    assert main([str(project)]) == 0
    assert "0 files written" in capsys.readouterr().out
    assert (project / "slurm" / "site.sh").read_text() == "PARTITION=mine\n"
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 2


def test_a_command_that_needs_an_absent_library_names_its_extra(capsys):
    def command():
        raise ModuleNotFoundError("No module named 'submitit'", name="submitit")

    assert guard(command) == 2
    assert "pip install 'fine_dist[slurm]'" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a library of ours that is missing is a defect, not a user's error
        guard(lambda: (_ for _ in ()).throw(ModuleNotFoundError("x", name="fine_dist.none")))


def test_the_command_line_is_found_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fine_dist", "init-project", "p"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "configs" / "study").is_dir()
