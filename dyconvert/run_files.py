"""Names of the files of a fine-tuning run and of a sweep, and of the columns of a sweep's table."""

# ---- In a run's directory, beside the best model ----

RECIPE = "recipe.yaml"
# The metrics before training.
BEFORE = "before.json"
SUMMARY = "summary.json"
METRICS = "metrics.csv"
# An interrupted run resumes from it.
CHECKPOINT = "resume.ckpt"
# Held by the process that works there.
LOCK = "run.lock"
# Folders: the last weights, the averaged ones, the static network's run, and the loggers' files.
LAST, EMA, PRETRAIN = "last", "ema", "pretrain"
LOGGERS = ("tensorboard", "wandb", "mlruns", "hparams.yaml")

RUN_FILES = (RECIPE, BEFORE, SUMMARY, METRICS, CHECKPOINT, LOCK, LAST, EMA, PRETRAIN, *LOGGERS)

# ---- In a sweep's directory, beside the runs' ----

SWEEP, TABLE = "sweep.csv", "sweep.md"

# Columns that identify a setting. Rows that are equal in all of them differ only in their seeds.
SETTINGS = ("run", "recipe", "method", "g", "width", "flops", "static", "epochs")
SCORES = ("original", "converted", "finetuned", "ema")
COSTS = ("parameters", "macs", "seconds")
COLUMNS = (SETTINGS[0], "seed", *SETTINGS[1:], *SCORES, *COSTS, "fingerprint")
TEXTS = ("run", "recipe", "method", "fingerprint")
WHOLE_NUMBERS = ("seed", "g", "epochs")
