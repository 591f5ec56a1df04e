"""WebDataset tars, Hugging Face streams and token files: shared out by process and worker, gone on with in an epoch."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.core.training import data_loader
from nearfar.language.texts import byte_tokenizer, read_tokens
from nearfar.language.training import Windows
from nearfar.vision.data.sources import open_pictures


def tars(folder: Path):
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for i in range(8):
                content = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), 16 * (8 * shard + i), np.uint8)).save(content, "PNG")
                for ending, data in (("png", content.getvalue()), ("cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(f"{shard}{i}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    pictures = open_pictures(folder)
    pictures.transform = lambda picture: int(np.asarray(picture)[0, 0, 0])
    return pictures


def stream(folder: Path):
    rows = [{"text": f"{i:03}."} for i in range(36)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return Windows(read_tokens([str(folder / "rows.parquet")], byte_tokenizer()), 8)


def tokens(folder: Path):
    (folder / "text.txt").write_text("".join(f"{i:03}." for i in range(33)))
    return Windows(read_tokens([str(folder / "text.txt")], byte_tokenizer()), 8)


def items(dataset, epoch: int, workers: int = 0) -> list:
    loader = data_loader(dataset, 2, shuffle=True, seed=1, num_workers=workers)
    loader.sampler.set_epoch(epoch)
    batches = [batch[0] if isinstance(batch, list) else batch for batch in loader]
    return [tuple(x.flatten().tolist()) for x in torch.cat(batches)]


@pytest.mark.parametrize("make", [tars, stream, tokens])
def test_every_item_is_in_one_share_and_an_epoch_is_found_again(make, tmp_path, monkeypatch):
    dataset = make(tmp_path)
    whole = items(dataset, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = {}
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares[rank] = [items(dataset, epoch) for epoch in range(2)]
        assert items(dataset, 1) == shares[rank][1], "a run that goes on finds its epoch again"
        assert items(dataset, 1, workers=2) == shares[rank][1], "by workers too"
    for epoch in range(2):
        together = shares[0][epoch] + shares[1][epoch]
        assert len(set(together)) == len(together) == len(whole)
        assert set(together) == set(whole)
    assert shares[0][0] != shares[0][1]
