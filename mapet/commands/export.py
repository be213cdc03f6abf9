"""`mapet export`."""

from mapet.commands.options import Export
from mapet.model.export import export
from mapet.training.checkpoint import load_weights
from mapet.words import say


def run(options: Export) -> int:
    """Export a checkpoint and print the line that loads it."""
    model, _, weights = load_weights(options.checkpoint, ema=options.ema)
    report = export(model, weights, options.output, name=options.name, global_pool=options.pool)
    say(
        f"{report.folder}: {report.parameters:,} parameters; timm's features differ from the model's by "
        f"{report.largest_difference:.1e} of the largest\n"
        f"left out, as only pre-training needs them: {', '.join(report.dropped) or 'nothing'}\n"
        f"load it with: {report.load_line}"
    )
    return 0
