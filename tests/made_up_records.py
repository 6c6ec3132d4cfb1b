"""Records with chosen numbers, as a run would write them."""

from typing import Any

import numpy as np

from histodd_bench import results


def record(
    accuracy: float,
    *,
    method: str = "random",
    ipc: int | None = 10,
    seed: int | None = 0,
    eval_seed: int = 0,
    dataset: str = "idc",
    arch: str = "convnet-d3",
    fields: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    procedural: bool = False,
    classes: tuple[str, ...] = ("normal", "tumour"),
    metrics: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> results.Record:
    whole = method == "full"
    training = {
        "epochs": 50, "steps": None, "batch_size": 64, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4,
        "augment": ["flip", "rotate", "scale"], "stain_train": 0.5, "stain_test": False, "balanced": False,
    }  # fmt: skip
    config = {
        "data": {"name": dataset, "train": "a", "test": "b", "image_size": 32, "split_seed": 0},
        "threads": 2,
        "device": "cpu",
        "set": {
            "method": method,
            "version": 1,
            "fields": fields or {},
            "ipc": None if whole else ipc,
            "seed": None if whole else seed,
            "pool": {"arch": "convnet-d3", "width": 64, "networks": 5, "epochs": 10} if method == "histodd" else None,
        },
        "eval": {"arch": arch, "width": 64, "seed": eval_seed, **training, **(recipe or {})},
    }
    return {
        "key": results.key_of(config),
        "dataset": dataset,
        "method": method,
        "ipc": None if whole else ipc,
        "arch": arch,
        "distill_seed": None if whole else seed,
        "eval_seed": eval_seed,
        "config": config,
        "metrics": {"accuracy": accuracy, "balanced_accuracy": accuracy - 0.1, "auc": accuracy + 0.05,
                    "epoch_seconds": 4.0 if whole else 0.05, **(metrics or {})},
        "storage": {"count": 5000 if whole else 2 * (ipc or 0), "shape": [3, 32, 32],
                    "raw_uint8_bytes": 3072 * (5000 if whole else 2 * (ipc or 0)), "disk_bytes": 1024, "estimated": False},
        "seconds": {} if whole else {"method": 2.5, "networks": 0.0, "total": 2.5},
        "stain": {"train": 0.5, "test": False, "chosen": "auto: chosen on training data", "scores": {"off": 0.71, "half": 0.74}},
        "set": None if whole else "a-set",
        "data": {"classes": list(classes), "train_patches": 5000, "test_patches": 2000, "train_groups": 140, "test_groups": 60,
                 "procedural": procedural, "notes": list(notes)},
        "environment": {"histodd-bench": "0.1.0", "commit": None, "python": "3.11", "torch": "2.14", "device": "A CPU",
                        "threads": 2, "platform": "Linux"},
        "predictions": {"probabilities": results.pack(np.array([[0.25, 0.75]], np.float16))},
    }  # fmt: skip
