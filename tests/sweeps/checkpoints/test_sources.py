"""Where checkpoints are found, how they are named, and what shows that one is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sharpness.core.errors import InputError
from megatron_sharpness.sweeps.checkpoints.sources import in_folder, matching, of_hugging_face

BRANCHES = [
    "main",
    "stage1-step1000-tokens5B",
    "stage1-step100000-tokens420B",
    "stage1-step20000-tokens84B",
    "stage2-ingredient1-step1000-tokens5B",
]


def save(folder: Path, *files: str) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()


def test_the_checkpoints_of_a_run_are_found_and_half_written_ones_told(tmp_path: Path) -> None:
    save(tmp_path / "iter_0000100", ".metadata", "metadata.json")
    save(tmp_path / "iter_0000020", ".metadata", "progress.json")
    save(tmp_path / "iter_0000040", "__0_0.distcp", "metadata.json")
    save(tmp_path / "iter_0000060", "__0_0.distcp")
    save(tmp_path / "iter_0000080", ".metadata")
    save(tmp_path / "iter_0000090" / "mp_rank_00")
    save(tmp_path / "iter_0000099.tmp")
    with pytest.raises(InputError, match=r"no latest_checkpointed_iteration.txt.*100 say"):
        in_folder(tmp_path, None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    found = in_folder(tmp_path, None)
    assert [c.iteration for c in found] == [20, 40, 60, 80, 90, 100]
    assert found[0].label == "iter_0000020"
    assert found[0].flags == (
        "--load", str(tmp_path), "--ckpt-step", "20", "--exit-on-missing-checkpoint",
    )  # fmt: skip
    problems = {c.iteration: c.problem for c in found}
    assert problems[20] is problems[90] is problems[100] is None
    for iteration, missing in (
        (40, "has no .metadata"),
        (60, "has no .metadata and no metadata.json (Megatron's) or progress.json"),
        (80, "has no metadata.json (Megatron's) or progress.json"),
    ):
        assert f"half-written: {tmp_path}/iter_{iteration:07d} {missing}" in str(
            problems[iteration]
        )
    assert [c.iteration for c in in_folder(tmp_path, [100, 20])] == [20, 100]
    with pytest.raises(InputError, match=r"--iterations 30: .* holds 20, 40, 60, 80, 90, 100"):
        in_folder(tmp_path, [20, 30])


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it holds no iter_… folder"):
        in_folder(tmp_path, None)


def test_revisions_say_where_in_the_training_they_are() -> None:
    first, second, last = of_hugging_face(["a/b"], [BRANCHES[1], BRANCHES[4], "main"])
    assert first.flags == ("--hf-model", "a/b", "--hf-revision", "stage1-step1000-tokens5B")
    assert (first.iteration, first.tokens, first.label) == (1000, 5e9, BRANCHES[1])
    assert second.iteration == 1000 and second.label == BRANCHES[4]
    assert (last.iteration, last.tokens, last.label) == (None, None, "main")


def test_patterns_are_the_branches_that_match_by_number() -> None:
    assert matching(BRANCHES, ["stage1-step*"]) == [BRANCHES[1], BRANCHES[3], BRANCHES[2]]
    assert matching(BRANCHES, ["stage2-*", "main", "*step?00000-*", "main"]) == [
        BRANCHES[4], "main", BRANCHES[2],
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"--revisions stage3-\*: no branch matches; .*main"):
        matching(BRANCHES, ["main", "stage3-*"])


def test_folders_are_named_by_where_they_differ_and_incomplete_ones_told(tmp_path: Path) -> None:
    for name in ("one/final", "two/final", "two/step5"):
        save(tmp_path / name, "config.json", "model.safetensors")
    models = [str(tmp_path / name) for name in ("one/final", "two/final", "two/step5")]
    found = of_hugging_face(models, [])
    assert [c.label for c in found] == ["one-final", "two-final", "step5"]
    assert [c.problem for c in found] == [None] * 3
    assert found[2].iteration == 5
    assert found[0].flags == ("--hf-model", models[0])

    folder = tmp_path / "two/step5"
    (folder / "model.safetensors").unlink()
    assert of_hugging_face([str(folder)], [])[0].problem == f"{folder} has no weights"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    assert "half-written: " in str(of_hugging_face([str(folder)], [])[0].problem)
    assert "has no model-2.safetensors" in str(of_hugging_face([str(folder)], [])[0].problem)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "half-written: " in str(of_hugging_face([str(folder)], [])[0].problem)
    (folder / "config.json").unlink()
    assert of_hugging_face([str(folder)], [])[0].problem == f"{folder} has no config.json"


def test_names_that_do_not_tell_checkpoints_apart_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", "config.json", "model.bin")
    with pytest.raises(InputError, match="two checkpoints have this name"):
        of_hugging_face([str(tmp_path / "a")] * 2, [])
    with pytest.raises(InputError, match="--revisions are of one model"):
        of_hugging_face(["a", "b"], ["main"])
