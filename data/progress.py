"""Progress bars, by tqdm. Where it is not installed there are none, as where stderr is no terminal."""

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:
        """What of tqdm's interface is used here, without a bar."""

        disable = True

        def __init__(self, iterable=(), *args, **kwargs):
            self.iterable, self.n = iterable, 0

        def __iter__(self):
            return iter(self.iterable)

        def update(self, count=1):
            self.n += count

        def set_postfix_str(self, text):
            pass

        def close(self):
            pass


__all__ = ["tqdm"]
