"""One question per module: `TITLE`, and `run(bench)`, which measures, records and shows."""

from benchmarks.questions import (
    fanout,
    half_load,
    idle,
    pipelines,
    scale,
    single,
    startup,
    values,
    workers,
)

QUESTIONS = {
    "single": single,
    "values": values,
    "pipelines": pipelines,
    "half_load": half_load,
    "scale": scale,
    "idle": idle,
    "fanout": fanout,
    "workers": workers,
    "startup": startup,
}
