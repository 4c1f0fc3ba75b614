"""A stand-in for datasets.IterableDataset: the five things that StreamSource uses of it."""


class FakeIterableDataset:
    """Shards of records. Like the real one, `state_dict` names the place after the last record
    that was drawn, a new iteration starts at the loaded state, and `state_dict` does not show a
    loaded state before that."""

    def __init__(self, shards, features=None):
        self._shards = shards
        self.features = features
        self._state = {"shard": 0, "record": 0}
        self._starting = self._state

    @property
    def num_shards(self):
        return len(self._shards)

    def shard(self, num_shards, index):
        size, longer = divmod(len(self._shards), num_shards)
        start = index * size + min(index, longer)
        stop = start + size + (index < longer)
        if start == stop:
            raise IndexError("list index out of range")
        return FakeIterableDataset(self._shards[start:stop])

    def state_dict(self):
        return dict(self._state)

    def load_state_dict(self, state):
        self._starting = dict(state)

    def __iter__(self):
        first, skip = self._starting["shard"], self._starting["record"]
        for shard in range(first, len(self._shards)):
            for record in range(skip, len(self._shards[shard])):
                self._state = {"shard": shard, "record": record + 1}
                item = self._shards[shard][record]
                if isinstance(item, Exception):
                    raise item
                yield item
            skip = 0
