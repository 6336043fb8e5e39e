"""A sweep as a data frame of pandas, and a figure from it.

    cerl sweep demo
    python sweep_frame.py runs/demo

needs pandas (`pip install pandas`), which cerl itself does not.
"""

import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure


def scores(folder: Path) -> pandas.DataFrame:
    """Scores of the single members: a row for each preset, number of agent steps and seed."""
    rows = pandas.concat(pandas.read_parquet(path) for path in folder.rglob("rows.parquet"))
    members = rows[rows["policy"] == "individual"]
    cells = members.groupby(["preset", "step", "seed"])[["return"]].mean()
    return pandas.DataFrame(cells).reset_index()


def figure(frame: pandas.DataFrame, file: Path) -> None:
    """A curve for each preset: the mean over seeds, and a band from the worst to the best seed."""
    drawn = Figure(figsize=(5, 3), layout="constrained")
    axes = drawn.subplots()
    for preset, own in frame.groupby("preset"):
        curve = own.groupby("step")["return"].agg(["mean", "min", "max"])
        axes.plot(curve.index, curve["mean"], label=str(preset))
        axes.fill_between(curve.index, curve["min"], curve["max"], alpha=0.2)
    axes.set(xlabel="agent steps", ylabel="return of a member")
    axes.legend()
    drawn.savefig(file)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    frame = scores(folder)
    print(frame.pivot_table("return", index="preset", columns="step"))
    figure(frame, folder / "frame.png")
