"""Several sources in one dataset: how much of each is used, how often it is trained on, and where duplicates go."""

import math

import torch

from config import UserError


def choose_rows(source_of, sources, seed):
    """The rows that are used: all of a source, or a random part of it where it asks for a share or a count.

    Args:
        source_of: for each row the number of its source.
        sources: a list of `Source`.

    Raises:
        UserError: a source has fewer rows than it asks for.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, source in enumerate(sources):
        rows = [row for row, of in enumerate(source_of) if of == number]
        wanted = source.count or math.ceil(len(rows) * min(1.0, source.weight))
        if source.count and source.count > len(rows):
            raise UserError(f"--dataset {source.name}#{source.count}: {len(rows):,} conversations of it were read")
        order = torch.randperm(len(rows), generator=generator)[:wanted].sort().values.tolist()
        chosen += [rows[i] for i in order]
    return chosen


def repeat_by_weight(rows, source_of, sources, seed):
    """Training rows, those of a source of weight 2 twice, and of weight 2.5 every other one a third time."""
    generator = torch.Generator().manual_seed(seed)
    repeated = []
    for number, source in enumerate(sources):
        of_source = [row for row in rows if source_of[row] == number]
        times, fraction = divmod(max(1.0, source.weight), 1)
        extra = torch.randperm(len(of_source), generator=generator)[: round(fraction * len(of_source))].tolist()
        repeated += of_source * int(times) + [of_source[i] for i in extra]
    return repeated


def keep_duplicates_together(splits, digests):
    """Splits in which all rows of one digest are where its first row was put; without duplicates, unchanged."""
    split_of = {}
    for row, number in sorted((row, number) for number, rows in enumerate(splits) for row in rows):
        split_of.setdefault(digests[row], number)
    together = [[row for row in rows if split_of[digests[row]] == number] for number, rows in enumerate(splits)]
    for number, rows in enumerate(splits):
        for row in rows:
            if split_of[digests[row]] != number:
                together[split_of[digests[row]]].append(row)
    return together
