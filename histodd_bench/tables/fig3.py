"""Figure 3 of the supplement: continual learning from small memories of data sets that arrive one after the other."""

from histodd_bench.tables.declaration import Column, Metric, Plot, Table

TABLE = Table(
    name="fig3",
    title="Figure 3: task-incremental continual learning from memory (GDumb)",
    columns=(
        Column("Random", "random"),
        Column("Herding", "herding"),
        Column("Histo-DD", "histodd"),
    ),
    metrics=(
        Metric("Accuracy %, the task is known", "metrics.masked_accuracy", scale=100, best=True),
        Metric("Accuracy %, classes of all tasks", "metrics.accuracy", scale=100, best=True),
        Metric("Balanced accuracy %, the task is known", "metrics.masked_balanced_accuracy", scale=100, best=True),
        Metric("Training time per epoch, s", "metrics.epoch_seconds", digits=3, spread=False),
    ),
    kind="sequence",
    ipc=(10,),
    options={"quick": {"seeds": 2, "eval_seeds": 2}},
    paper_arch="ResNet18",
    plots=(
        Plot("Accuracy, the task is known", "stage", "metrics.masked_accuracy"),
        Plot("Accuracy, classes of all tasks", "stage", "metrics.accuracy"),
    ),
    remarks=(
        "After each stage a new network is trained from scratch on the memory: the sets of all data sets seen so far, each "
        "with its own classes. Accuracy is the mean over the data sets seen, each counting the same, at the last epoch.",
        "The paper shows this figure as curves without numbers, for TCGA-IDH, UniToPath (DG), Camelyon16 in this order.",
    ),
)
