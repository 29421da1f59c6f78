"""Layers of one sort, of which every kind is a file of its own, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data.settings import ConfigError, build
from train.model.config import ModelConfig


@dataclass(frozen=True)
class Kinds:
    """The kinds of a package: its files whose names do not begin with an underscore.

    Each holds `Config`, a dataclass of its settings (`model.<section>.<name>.*`). A model may use
    one file under several names with different settings: then `model.<section>.<name>.kind` names
    the file.

    Attributes:
        package: its name.
        section: the settings' mapping of names to settings.
        patterns: the settings that name the kinds of blocks, for messages.
    """

    package: str
    section: str
    patterns: str

    def names(self) -> list[str]:
        """Names of all files."""
        folders = importlib.import_module(self.package).__path__
        found = (module.name for module in pkgutil.iter_modules(folders))
        return sorted(name for name in found if not name.startswith("_"))

    def resolve(self, name: str, model: ModelConfig) -> tuple[ModuleType, Any]:
        """The module and the settings of a name in a pattern.

        Raises:
            ConfigError: there is no such kind, or it has no such setting.
        """
        where = f"model.{self.section}.{name}"
        given = self._settings(model).get(name, {})
        if not isinstance(given, dict):
            raise ConfigError(f"{where} is {given!r}; it must be a mapping of settings")
        kind = given.get("kind", name)
        if kind not in self.names():
            raise ConfigError(
                f"{self.patterns} names {kind!r}; the {self.section} are {', '.join(self.names())}"
            )
        module = importlib.import_module(f"{self.package}.{kind}")
        values = {key: (value, where) for key, value in given.items() if key != "kind"}
        return module, build(module.Config, values, where)

    def check(self, used: Collection[str], model: ModelConfig) -> None:
        """Check the settings of every kind in use, and their names.

        Settings of a kind that no block uses are allowed if it has a file: the base of a sweep sets
        several.

        Raises:
            ConfigError: as `resolve`, or settings have a name that is neither used nor a file's.
        """
        for name in dict.fromkeys(used):
            self.resolve(name, model)
        for name in self._settings(model):
            if name not in self.names():
                self.check_used(name, f"model.{self.section}.{name} is set", used)

    def _settings(self, model: ModelConfig) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(model, self.section)
        return found

    def check_used(self, name: str, said: str, used: Collection[str]) -> None:
        """Raises ConfigError, beginning with what was `said`, if no block uses that name."""
        if name not in used:
            raise ConfigError(
                f"{said}, but {self.patterns} names only {', '.join(dict.fromkeys(used))}"
            )
