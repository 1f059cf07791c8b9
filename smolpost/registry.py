"""What can be added to the library, by name: stage kinds, evaluation tasks, preference losses, rewards and row shapes.

The library's own entries register when their modules are imported; a user's own come from the modules that a recipe
names under `plugins` (docs/extending.md).
"""

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from smolpost.errors import UserError

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by their names, in the order in which they were added.

    Args:
        what: The kind of entry, for messages.
    """

    def __init__(self, what: str):
        self.what, self._entries = what, {}

    def add(self, name: str, entry: Entry) -> Entry:
        """Add an entry; adding one of the same module again (a module that is imported twice) replaces it.

        Raises:
            UserError: Another module has added one of that name.
        """
        other = self._entries.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (entry.__module__, entry.__qualname__):
            raise UserError(
                f"{entry.__module__} adds the {self.what} {name}, which {other.__module__} has added; "
                "choose another name"
            )
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def check_dataclass(cls: type) -> None:
    """Refuse a class whose annotations are not fields: recipes could not set them.

    Raises:
        UserError: The class itself is not a dataclass.
    """
    if "__dataclass_fields__" not in vars(cls):
        raise UserError(f"{cls.__module__}.{cls.__qualname__} is not a dataclass; put @dataclass right above the class")


def check_defined(cls: type, base: type, *methods: str) -> None:
    """Refuse a class that leaves a method as its base has it.

    Raises:
        UserError: With the first such method.
    """
    for method in methods:
        if getattr(cls, method, None) is getattr(base, method):
            raise UserError(f"{cls.__module__}.{cls.__qualname__} has no method {method}; define it")


STAGE_KINDS: Registry[type] = Registry("stage kind")
TASK_KINDS: Registry[type] = Registry("evaluation task")
LOSSES: Registry = Registry("preference loss")
REWARDS: Registry = Registry("reward")
ROW_SHAPES: Registry = Registry("row shape")
