"""The comparison as a picture: who finds its adapter where, and who waits how long. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

from manylora_loadtest.cluster.replicas import DEVICE, HOST, STORE
from manylora_loadtest.cluster.simulation import Outcome

__all__ = ["draw"]

_TIERS = {DEVICE: ("on the device", "#2a9d6f"), HOST: ("in host memory", "#e9c46a"), STORE: ("in the store", "#d64545")}
_WAIT_COLOUR = "#2f7ed8"
_SHORTEST_S = 0.1  # where the axis of waits begins


def draw(found: Mapping[str, Mapping[str, Outcome]], path: Path) -> None:
    """`found`: outcomes by setting and policy. The file's ending says its format."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    size = (11.0, 2.6 * len(found))
    figure, axes = pyplot.subplots(len(found), 2, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for (title, outcomes), (shares, waits) in zip(found.items(), axes, strict=True):
        names = list(outcomes)
        left = [0.0] * len(names)
        for tier, (label, colour) in _TIERS.items():
            width = [100 * outcome.share(tier) for outcome in outcomes.values()]
            shares.barh(names, width, left=left, color=colour, label=label)
            left = [start + more for start, more in zip(left, width, strict=True)]
        shares.set(title=title, xlim=(0, 100), xlabel="% of requests found their adapter")
        seconds = [max(outcome.p99_s(), _SHORTEST_S) for outcome in outcomes.values()]
        waits.barh(names, seconds, color=_WAIT_COLOUR)
        waits.set(title="p99 of queue and load", xscale="log", xlim=(_SHORTEST_S, None), xlabel="s")
        shares.invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(_TIERS))
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
