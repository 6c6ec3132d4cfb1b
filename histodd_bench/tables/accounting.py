"""What every table counts: how good, how fast, how large, and what making the sets cost."""

from histodd_bench.tables.declaration import Metric, Plot

ACCURACY = Metric("Accuracy %", "metrics.accuracy", scale=100, best=True, interval=True)
BALANCED = Metric("Balanced accuracy %", "metrics.balanced_accuracy", scale=100, best=True, interval=True)
AUC = Metric("Macro AUC %", "metrics.auc", scale=100, best=True)
QUALITY = (ACCURACY, BALANCED, AUC)
EPOCH = Metric("Training time per epoch, s", "metrics.epoch_seconds", digits=3, times=True, spread=False)
OUTER_STEPS = Metric("Outer loops K", "fields.outer_steps", digits=0, spread=False)
COSTS = (
    EPOCH,
    Metric("of which loading patches, s", "seconds.loading", digits=4, spread=False),
    Metric("of which computing, s", "seconds.computing", digits=3, times=True, spread=False),
    Metric("Peak memory while training, MiB", "memory.training", scale=2**-20, digits=0, spread=False),
    Metric("Selection / distillation time, s", "seconds.method", digits=1, spread=False),
    Metric("Networks behind it and candidates' gradients, s", "seconds.networks", digits=1, spread=False),
    Metric("Peak memory of that, MiB", "memory.making", scale=2**-20, digits=0, spread=False),
    Metric("Epochs after which it has paid for itself", "derived.epochs_to_pay", digits=0, spread=False),
    Metric("Patches", "storage.count", digits=0, spread=False),
    Metric("Raw uint8 pixels, KiB", "storage.raw_uint8_bytes", scale=1 / 1024, digits=1, times=True, spread=False),
    Metric("On disk (lossless, with labels), KiB", "storage.disk_bytes", scale=1 / 1024, digits=1, spread=False),
)
ALL = (*QUALITY, *COSTS)

PLOTS = (
    Plot("Accuracy against images per class", "ipc", "metrics.accuracy", log=True),
    Plot("Accuracy against storage (raw uint8, KiB)", "storage.raw_uint8_bytes", "metrics.accuracy", log=True),
    Plot("Accuracy against training time per epoch (s)", "metrics.epoch_seconds", "metrics.accuracy", log=True),
)
