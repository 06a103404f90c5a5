"""Key-value cache of the native model.

Shape suffixes: B batch, G key/value heads, T new tokens, S tokens so far, K head width.
"""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in buffers allocated at the first append."""

    def __init__(self, capacity_tokens: int):
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return views of all keys and values so far, ``(B, G, S, K)``."""
        batch, heads, num_new, width = k_BGTK.shape
        if self._keys is None:
            self._keys = k_BGTK.new_empty(batch, heads, self.capacity_tokens, width)
            self._values = v_BGTK.new_empty(batch, heads, self.capacity_tokens, width)
        end = self.length + num_new
        assert end <= self.capacity_tokens, f"cache of {self.capacity_tokens} tokens cannot take {end}"
        self._keys[:, :, self.length : end] = k_BGTK
        self._values[:, :, self.length : end] = v_BGTK
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """One :class:`LayerCache` per block; dtype and device follow the first keys stored."""

    def __init__(self, num_layers: int, capacity_tokens: int):
        self.layers = [LayerCache(capacity_tokens) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens stored, which is the position of the next one."""
        return self.layers[0].length
