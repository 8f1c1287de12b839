"""The types of settings: how values are read, and what all groups have in common."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


def pair(value: object) -> object:
    """Two values of one text, as in 0.9,0.95."""
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    if len(parts) != 2:
        raise ValueError("must be two numbers, as in 0.9,0.95")
    return parts


def listed(value: object) -> object:
    """The values of a text with commas."""
    return value.split(",") if isinstance(value, str) else value


def truth(value: object) -> object:
    """The usual words for yes and no as true and false."""
    word = str(value).strip().lower()
    is_true, is_false = word in ("1", "yes", "on", "true"), word in ("0", "no", "off", "false")
    return "true" if is_true else "false" if is_false else word


def home(value: object) -> object:
    """A path whose ~ is a home folder."""
    try:
        return Path(value).expanduser() if isinstance(value, str) else value
    except RuntimeError:
        raise ValueError("begins with ~, but there is no such user's home folder") from None


Number = Annotated[float, Field(allow_inf_nan=False)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Wait = Annotated[Number, Field(ge=0, le=86400)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Location = Annotated[Path, BeforeValidator(home)]


class Group(BaseSettings):
    """Settings that share a prefix."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_others: PydanticBaseSettingsSource,
        **_named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave every place to app.settings.sources, which names each of them in its errors."""
        return (init_settings,)

    @classmethod
    def prefix(cls) -> str:
        """The prefix of the group's environment variables."""
        return cls.model_config.get("env_prefix", "")

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Environment variable -> field name."""
        return {f"{cls.prefix()}{name}".upper(): name for name in cls.model_fields}

    @classmethod
    def default_text(cls, field: str) -> str:
        """A field's default as an environment variable has it; empty if it has none."""
        default = cls.model_fields[field].default
        if default is None:
            return ""
        if isinstance(default, bool):
            return str(default).lower()
        if isinstance(default, tuple):
            return ",".join(map(str, default))
        return str(default)
