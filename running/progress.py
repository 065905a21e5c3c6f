"""The progress of a run's updates: a bar on a terminal, lines elsewhere."""

import time

from tqdm import tqdm

from evaluation.facts import format_duration

INTERVAL = 30  # seconds between two lines, at most, unless an update takes longer


class Progress:
    """A progress bar on a terminal; elsewhere a line on stdout at least every half minute."""

    def __init__(self, total, done=0, clock=time.monotonic):
        """Start before update `done` + 1 of `total`."""
        self.total, self.first, self.done, self.clock = total, done, done, clock
        self.start = self.last_line = clock()
        self.bar = tqdm(total=total, initial=done, unit="update", disable=None)  # None: only on a terminal

    def update(self, metrics):
        """Report an update that is done, with its "loss" and "tokens_per_second"."""
        self.done += 1
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        self.bar.update()
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed}")
        now = self.clock()
        seconds = (now - self.start) / (self.done - self.first)  # of an average update
        if self.bar.disable and now - self.last_line + seconds > INTERVAL:  # the next one might end too late
            self.last_line = now
            left = format_duration(seconds * (self.total - self.done))
            print(f"  update {self.done:>5} of {self.total}   loss {metrics['loss']:.4f}   {speed}   about {left} left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
