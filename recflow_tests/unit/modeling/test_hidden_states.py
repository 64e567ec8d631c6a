import errno
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recflow.core.errors import ArtifactError, ConfigError, TransientError
from recflow.core.seeding import make_rng
from recflow.modeling import hidden_states
from recflow.modeling.encoder import TextEncoder, load_pretrained
from recflow.modeling.hidden_states import HiddenStates, HiddenStateStore

PLENTY = 1 << 30


@pytest.fixture
def encoder(base_model: Path) -> TextEncoder:
    return load_pretrained(base_model)


def make_tokens(count: int, seed: int = 0) -> list[list[int]]:
    """Distinct token ids of 3 to 12 tokens."""
    rng = make_rng(seed, "tokens")
    drawn = {tuple(rng.integers(5, 35, rng.integers(3, 13)).tolist()): None for _ in range(count)}
    return [list(text) for text in drawn]


def fill(
    directory: Path, encoder: TextEncoder, tokens: list[list[int]], max_bytes: int = PLENTY, **more
) -> HiddenStates:
    arguments = {"layer": 1, "precision": "fp32"} | more
    return HiddenStateStore(directory, max_bytes=max_bytes).states(encoder, tokens, **arguments)


def everything(states: HiddenStates) -> torch.Tensor:
    return states.gather(np.arange(len(states.lengths)))


def segments_below(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_states_are_those_of_the_encoder(encoder: TextEncoder, tmp_path: Path, layer: int) -> None:
    tokens = make_tokens(20)
    states = fill(tmp_path, encoder, tokens, layer=layer)
    for row, text in enumerate(tokens):
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = encoder.run_layers(encoder.embed(ids), torch.ones_like(ids).bool(), 0, layer)
        torch.testing.assert_close(states.gather(np.array([row])), expected[0])


def test_gather_returns_texts_in_the_order_asked_for(encoder: TextEncoder, tmp_path: Path) -> None:
    states = fill(tmp_path, encoder, make_tokens(12))
    rows = np.array([7, 0, 7, 3])
    assert states.gather(rows).shape == (states.lengths[rows].sum(), encoder.width)
    alone = [states.gather(rows[place : place + 1]) for place in range(len(rows))]
    assert torch.equal(states.gather(rows), torch.cat(alone))
    assert states.gather(np.array([], dtype=np.int64)).shape == (0, encoder.width)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float)])
def test_precision_decides_the_stored_type(
    encoder: TextEncoder, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    assert everything(fill(tmp_path, encoder, make_tokens(5), precision=precision)).dtype == dtype


def test_second_run_computes_nothing_and_reads_the_same_bits(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    tokens = make_tokens(50)
    first = fill(tmp_path, encoder, tokens)
    before = segments_below(tmp_path)
    told: list[int] = []
    second = fill(tmp_path, encoder, tokens, on_texts=told.append)
    assert (first.computed, first.reused) == (len(tokens), 0)
    assert (second.computed, second.reused, told) == (0, len(tokens), [])
    assert segments_below(tmp_path) == before
    assert torch.equal(everything(first), everything(second))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bits_do_not_depend_on_what_was_computed_together(
    encoder: TextEncoder, tmp_path: Path, precision: str
) -> None:
    tokens = make_tokens(60)
    cold = fill(tmp_path / "cold", encoder, tokens, precision=precision)
    for part in (tokens[40:], tokens[5:41], tokens[::-1]):  # yesterday's, today's, all
        warm = fill(tmp_path / "warm", encoder, part, precision=precision)
    assert warm.computed == 5
    assert torch.equal(
        warm.gather(np.arange(len(tokens))[::-1].copy()),
        everything(cold),
    )


def test_order_of_the_texts_does_not_change_the_files(encoder: TextEncoder, tmp_path: Path) -> None:
    tokens = make_tokens(30)
    fill(tmp_path / "a", encoder, tokens)
    fill(tmp_path / "b", encoder, tokens[::-1])
    assert segments_below(tmp_path / "a") == segments_below(tmp_path / "b")


def test_equal_texts_are_computed_once(encoder: TextEncoder, tmp_path: Path) -> None:
    told: list[int] = []
    states = fill(tmp_path, encoder, [[2, 7, 3], [2, 8, 9, 3], [2, 7, 3]], on_texts=told.append)
    assert sum(told) == states.computed == 2
    assert states.reused == 0
    assert torch.equal(states.gather(np.array([0])), states.gather(np.array([2])))


def test_key_is_of_weights_layer_precision_and_attention(
    encoder: TextEncoder, base_model: Path, tmp_path: Path
) -> None:
    tokens = make_tokens(5)

    def keys() -> int:
        return len(list(tmp_path.iterdir()))

    fill(tmp_path, encoder, tokens)
    fill(tmp_path, encoder, tokens, layer=2)
    fill(tmp_path, encoder, tokens, precision="bf16")
    assert keys() == 3
    changed = load_pretrained(base_model)
    with torch.no_grad():
        next(changed.layers[1].parameters()).add_(1.0)
    assert fill(tmp_path, changed, tokens).reused == len(tokens)  # layer 1 is not below layer 1
    assert fill(tmp_path, changed, tokens, layer=2).computed == len(tokens)
    assert keys() == 4
    changed.use_open_attention(False)
    assert fill(tmp_path, changed, tokens, layer=2).computed == len(tokens)
    assert keys() == 5


def test_segments_are_bounded_and_all_of_them_are_read(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fill(tmp_path / "whole", encoder, make_tokens(200))
    monkeypatch.setattr(hidden_states, "_SEGMENT_BYTES", 10_000)
    parts = fill(tmp_path / "parts", encoder, make_tokens(200))
    assert len(segments_below(tmp_path / "whole")) == 1
    assert len(segments_below(tmp_path / "parts")) > 5
    assert torch.equal(everything(whole), everything(parts))


def test_a_killed_run_keeps_the_segments_it_finished(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "_SEGMENT_BYTES", 10_000)
    tokens = make_tokens(200)
    expected = fill(tmp_path / "whole", encoder, tokens)

    def stop(_: int) -> None:
        if len(segments_below(tmp_path / "killed")) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "killed", encoder, tokens, on_texts=stop)
    resumed = fill(tmp_path / "killed", encoder, tokens)
    assert 0 < resumed.reused < len(tokens)
    assert torch.equal(everything(resumed), everything(expected))


def test_processes_share_the_work(encoder: TextEncoder, base_model: Path, tmp_path: Path) -> None:
    tokens, told = make_tokens(80), ([], [])
    barrier = threading.Barrier(2, timeout=60)
    found: dict[int, HiddenStates] = {}

    def run(rank: int) -> None:
        own = load_pretrained(base_model)
        found[rank] = fill(
            tmp_path / "shared", own, tokens,
            share=(rank, 2), barrier=barrier.wait, on_texts=told[rank].append,
        )  # fmt: skip

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told[0]) + sum(told[1]) == len(tokens)
    assert abs(sum(told[0]) - sum(told[1])) <= 1
    alone = everything(fill(tmp_path / "alone", encoder, tokens))
    assert all(torch.equal(everything(found[rank]), alone) for rank in range(2))
    assert found[0].computed == found[1].computed == len(tokens)


def test_a_process_without_the_shared_disk_computes_the_rest(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    told: list[int] = []
    states = fill(tmp_path, encoder, make_tokens(40), share=(1, 3), on_texts=told.append)
    assert sum(told) == len(states.lengths)


def test_two_runs_that_fill_the_same_key_at_once_are_both_right(
    base_model: Path, encoder: TextEncoder, tmp_path: Path
) -> None:
    tokens, found = make_tokens(80), {}

    def run(number: int) -> None:
        found[number] = fill(
            tmp_path / "both", load_pretrained(base_model), tokens[:: 1 - 2 * number]
        )

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = np.arange(len(tokens))
    alone = fill(tmp_path / "alone", encoder, tokens)
    assert torch.equal(found[0].gather(rows), everything(alone))
    assert torch.equal(found[1].gather(rows[::-1].copy()), everything(alone))


def test_more_than_the_limit_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    tokens = [[2, 7, 3], [2, 8, 9, 3], [2, 7, 3]]
    needed = 7 * 32 * 4  # distinct tokens, dimension, float32
    with pytest.raises(ConfigError, match=rf"max_cache_bytes = 895 .* at least {needed} .* raise"):
        fill(tmp_path, encoder, tokens, max_bytes=needed - 1)
    assert not segments_below(tmp_path)
    assert fill(tmp_path, encoder, tokens, max_bytes=needed).computed == 2


def test_keys_unused_for_longest_make_room(encoder: TextEncoder, tmp_path: Path) -> None:
    tokens = make_tokens(50)
    for layer in (0, 1):
        fill(tmp_path, encoder, tokens, layer=layer)
    size = max(map(len, segments_below(tmp_path).values()))
    for age, folder in enumerate(sorted(tmp_path.iterdir())):
        os.utime(folder, (1000 + age, 1000 + age))
    oldest, newer = sorted(tmp_path.iterdir())
    (tmp_path / "of somebody else").mkdir()
    fill(tmp_path, encoder, tokens, layer=2, max_bytes=2 * size + 1000)
    assert not oldest.exists()
    assert newer.exists()
    assert (tmp_path / "of somebody else").exists()


def test_its_own_older_segments_make_room_last(encoder: TextEncoder, tmp_path: Path) -> None:
    fill(tmp_path, encoder, make_tokens(50))
    (before,) = segments_below(tmp_path)
    limit = len(segments_below(tmp_path)[before]) + 1000
    today = make_tokens(50, seed=1)
    assert fill(tmp_path, encoder, today, max_bytes=limit).computed == len(today)
    assert before not in segments_below(tmp_path)


def test_leftovers_of_killed_runs_are_removed_when_they_are_old(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    fill(tmp_path, encoder, make_tokens(3))
    (folder,) = tmp_path.iterdir()
    old, fresh = folder / ".old.tmp", folder / ".fresh.tmp"
    for file in (old, fresh):
        file.write_bytes(b"half a segment")
    os.utime(old, (1000, 1000))
    assert fill(tmp_path, encoder, make_tokens(3)).computed == 0
    assert not old.exists()
    assert fresh.exists()


def test_losing_segments_to_another_run_is_transient(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states._KeyFolder, "open", lambda _: {})
    with pytest.raises(TransientError, match="loses segments while it is filled"):
        fill(tmp_path, encoder, make_tokens(3))


def test_full_disk_is_transient_and_leaves_a_valid_store(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, encoder, make_tokens(5))
    before = segments_below(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TransientError, match=rf"disk of {tmp_path}.* is full; free \d+ bytes"):
            fill(tmp_path, encoder, make_tokens(40))
    assert segments_below(tmp_path) == before
    assert fill(tmp_path, encoder, make_tokens(40)).computed > 0


def test_unwritable_folder_is_named(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/cache/.* Make the folder writable"):
        fill(tmp_path / "cache", encoder, make_tokens(3))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _overwrite_header(file: Path) -> None:
    file.write_bytes(b"x" * 300)


def _lose_a_text(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"hashes": tensors["hashes"][16:].clone()}, file, {"key": file.parent.name})


@pytest.mark.parametrize("damage", [_truncate, _overwrite_header, _lose_a_text])
def test_damaged_segments_are_named(encoder: TextEncoder, tmp_path: Path, damage) -> None:
    tokens = make_tokens(20)
    fill(tmp_path, encoder, tokens)
    (name,) = segments_below(tmp_path)
    damage(tmp_path / name)
    remedy = f"delete the folder {(tmp_path / name).parent}"
    with pytest.raises(ArtifactError, match=rf"{name} is damaged .*{re.escape(remedy)}"):
        fill(tmp_path, encoder, tokens)


def test_segments_of_another_key_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    tokens = make_tokens(20)
    fill(tmp_path, encoder, tokens)
    (name,) = segments_below(tmp_path)
    fill(tmp_path, encoder, tokens, layer=0)
    (other,) = set(segments_below(tmp_path)) - {name}
    (tmp_path / name).write_bytes((tmp_path / other).read_bytes())
    with pytest.raises(ArtifactError, match=rf"{name} belongs to the key {Path(other).parent}"):
        fill(tmp_path, encoder, tokens)


def test_unknown_precision_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision = 'fp16'"):
        fill(tmp_path, encoder, make_tokens(3), precision="fp16")


def _resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{kind}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux' /proc")
def test_opening_maps_and_gathering_reads_only_what_is_asked_for(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    """A segment of 64 MB, written by hand so that the test need not compute it."""
    tokens = [[2, 7, 3], [2, 8, 9, 3]]
    fill(tmp_path, encoder, tokens)
    (name,) = segments_below(tmp_path)
    file = tmp_path / name
    small = load_file(file)
    rows = 500_000
    filler = torch.ones(rows, encoder.width)
    hashes = torch.cat([small["hashes"], torch.zeros(16, dtype=torch.uint8)])
    save_file(
        {
            "states": torch.cat([small["states"], filler]),
            "offsets": torch.cat([small["offsets"], small["offsets"][-1:] + rows]),
            "hashes": hashes,
        },
        file,
        {"key": file.parent.name},
    )
    size = filler.numel() * 4
    before = _resident("RssFile")
    states = fill(tmp_path, encoder, tokens)
    gathered = everything(states)
    assert _resident("RssFile") - before < size / 8
    assert torch.equal(gathered, small["states"][: len(gathered)])
