"""fbgemm's and TorchRec's FM, for an interpreter that has them: torch, numpy, fbgemm_gpu, torchrec and no streamrec.

    python benchmarks/_with_torchrec.py DATA OUT [--library torchrec|fbgemm] [--batch N] [--lr F]

DATA: npz of `rows`, int64 `(n, fields)`, and `labels`, float32 `(n,)`. Writes the scores before learning to OUT,
float32 `(n,)`, and prints the CPU seconds as JSON. `benchmarks.criteo_like --torchrec-python` runs it.
"""

from __future__ import annotations

import argparse
import json
import logging
from importlib.metadata import version
from time import process_time

import numpy as np
import torch
from torch import Tensor, nn

logging.disable(logging.WARNING)  # of GPUs that are not there

DIM = 16
WIDTH = 20  # a linear weight and 16 factors; fbgemm wants a multiple of four, so three columns stay idle
SIGMA = 0.01


class FM(nn.Module):
    """Rendle 2010, eq. 5, over `(n, fields, WIDTH)`: the table moves in the backward pass, by the library's Adagrad."""

    def __init__(self, library: str, rows: int, fields: int, lr: float) -> None:
        super().__init__()
        self.fields = fields
        self.bias = nn.Parameter(torch.zeros(()))
        start = torch.empty(rows, WIDTH).normal_(std=SIGMA)
        start[:, 0] = 0
        start[:, 1 + DIM :] = 0
        self.torchrec = library == "torchrec"
        if self.torchrec:
            from torchrec.modules.embedding_configs import EmbeddingBagConfig
            from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection  # the one it has for CPUs

            table = EmbeddingBagConfig(name="t", embedding_dim=WIDTH, num_embeddings=rows, feature_names=["id"])
            self.table = FusedEmbeddingBagCollection(
                [table], torch.optim.Adagrad, {"lr": lr, "eps": 1e-10}, device=torch.device("cpu")
            )
            weights = next(iter(self.table.state_dict().values()))
        else:
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )

            self.table = SplitTableBatchedEmbeddingBagsCodegen(
                [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
                optimizer=EmbOptimType.EXACT_ADAGRAD,
                learning_rate=lr,
                eps=1e-10,
                pooling_mode=PoolingMode.SUM,  # of bags of one
            )
            weights = self.table.split_embedding_weights()[0]
        with torch.no_grad():
            weights.copy_(start)

    def forward(self, ids: Tensor) -> Tensor:  # (n, fields)
        flat = ids.reshape(-1)
        if self.torchrec:
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

            ones = torch.ones(len(flat), dtype=torch.int64)
            found = self.table(KeyedJaggedTensor(["id"], flat, lengths=ones))["id"]
        else:
            found = self.table(flat, torch.arange(len(flat) + 1))
        entries = found.view(len(ids), self.fields, WIDTH)
        sums = entries.sum(1)  # (n, WIDTH)
        pairs = 0.5 * (sums[:, 1:].square().sum(1) - entries[..., 1:].square().sum((1, 2)))
        return self.bias + sums[:, 0] + pairs


def run(library: str, rows: Tensor, labels: Tensor, size: int, lr: float) -> tuple[float, Tensor]:
    """CPU seconds and the scores, each batch predicted and then learned, on one thread."""
    torch.manual_seed(0)
    model = FM(library, int(rows.max()) + 1, rows.shape[1], lr)
    optimizer = torch.optim.Adagrad([model.bias], lr=lr)
    loss = nn.BCEWithLogitsLoss()
    logits = []
    start = process_time()
    for ids, part in zip(rows.split(size), labels.split(size), strict=True):
        out = model(ids)
        logits.append(out.detach())
        optimizer.zero_grad()
        loss(out, part).backward()
        optimizer.step()
    scores = torch.cat(logits).sigmoid()
    return process_time() - start, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--library", choices=("torchrec", "fbgemm"), default="fbgemm")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = np.load(options.data)
    rows, labels = torch.from_numpy(data["rows"]), torch.from_numpy(data["labels"])
    run(options.library, rows[: 2 * options.batch], labels[: 2 * options.batch], options.batch, options.lr)
    seconds, scores = run(options.library, rows, labels, options.batch, options.lr)
    np.save(options.out, scores.numpy())
    versions = {name: version(name) for name in ("torch", "fbgemm_gpu-cpu", "torchrec")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
