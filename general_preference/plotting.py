"""matplotlib without a display; where it is not installed pictures are left out with one log line."""

import logging

logger = logging.getLogger(__name__)


def load_pyplot():
    """`matplotlib.pyplot` drawing into files, or None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("matplotlib is not installed: pictures are left out (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
