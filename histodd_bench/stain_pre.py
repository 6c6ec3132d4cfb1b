"""Stain normalisation as pre-processing: a training set whose patches are normalised once, beforehand, kept on disk."""

from pathlib import Path
from typing import Any

import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.data.store import StoreError, StoreWriter, load
from histodd_bench.files import digest, locked
from histodd_bench.ops import stain_augment
from histodd_bench.sets import to_uint8
from histodd_bench.stain import StainTemplate, fit_affine

VERSION = 1
_CHUNK = 256


@torch.no_grad()
def normalised(train: PatchSet, template: StainTemplate, *, cache: Path, progress: Any) -> PatchSet:
    """Every patch normalised to the template and rounded to uint8; patches that cannot be fitted stay as they are.

    Args:
        train: real patches.
        template: what they are normalised to.
        cache: folder; the result is a store ``normalised-<key>`` in it, made on first use, memory-mapped.
        progress: a :class:`histodd_bench.progress.Progress`.
    """
    key = digest([VERSION, train.fingerprint(), template.stain_matrix, template.max_concentration])
    folder = cache / f"normalised-{key[:16]}"
    try:
        return load(folder)  # without a lock: the cache may be read-only
    except StoreError:
        pass
    with locked(folder.with_name(folder.name + ".lock")):
        try:
            return load(folder)  # another process may have made it meanwhile
        except StoreError:
            pass
        with (
            StoreWriter(folder, train.image_size, train.classes, train.centre_names) as writer,
            progress.task("normalising stains beforehand", len(train)) as task,
        ):
            for indices in torch.arange(len(train)).split(_CHUNK):
                images = train.images[indices]
                stain, valid = fit_affine(images, template)
                made = to_uint8(stain_augment(images, stain, None, None, None, valid=valid))
                made = torch.where(valid[:, None, None, None], made, images)
                names = [train.group_names[g] for g in train.groups[indices].tolist()]
                centres = {} if train.centres is None else {"centres": train.centres[indices].tolist()}
                writer.append(made.numpy(), train.labels[indices].tolist(), names, **centres)
                task.advance(len(indices))
            return writer.finish()
