"""Reports: what a run shows when it is done."""
