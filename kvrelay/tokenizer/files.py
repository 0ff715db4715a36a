"""A checkpoint's tokenizer, special tokens and chat template, read from its files as ``from_pretrained`` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models, processors

from kvrelay.checkpoint_files import read_json_object
from kvrelay.errors import CheckpointError
from kvrelay.tokenizer.chat_template_files import ChatTemplates, read_chat_templates
from kvrelay.tokenizer.classes import BACKEND, CLASSES, UNSUPPORTED, Builder, TokenizerClass, class_name

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may have; a checkpoint may name further ones."""

Token = str | AddedToken
_SETTINGS, _TOKENIZER, _OLDER_TOKENS = "tokenizer_config.json", "tokenizer.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles(NamedTuple):
    """What the files say. ``special_tokens``: names such as ``bos_token`` to the text of the token."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_templates: ChatTemplates


def read_tokenizer_files(model_dir: Path) -> TokenizerFiles:
    """Read the tokenizer of the checkpoint in ``model_dir``.

    Raises CheckpointError that names the file, and the key if there is one, that is missing, damaged, or asks for what
    is not supported.
    """
    files = _Files.read(model_dir)
    kind, tokenizer = files.tokenizer_class(), files.tokenizer()
    declared = files.added_tokens(tokenizer)
    specials = files.special_tokens(_defaults(kind, tokenizer), kind.extra_special_tokens).as_declared(declared)
    if kind.build is not None:
        tokenizer = files.rebuilt(tokenizer, kind.build)
    _add_tokens(tokenizer, declared, specials, plain=kind.plain_specials)
    files.check_ids(tokenizer, declared)
    if kind.begin is not None:
        tokenizer.post_processor = _begin(tokenizer, specials if kind.begin else None)
    tokenizer.encode_special_tokens = bool(files.settings.get("split_special_tokens"))
    named = {name: str(token) for name, token in specials.named.items()}
    return TokenizerFiles(tokenizer, named, read_chat_templates(model_dir, files.settings))


@dataclass(frozen=True, slots=True)
class _Specials:
    """The special tokens: those with a name, in order, and others."""

    named: dict[str, Token]
    extra: list[Token]

    def as_declared(self, declared: Mapping[int, AddedToken]) -> _Specials:
        """Return the same with the flags that ``declared`` gives to the tokens every tokenizer may have."""
        known: dict[str, Token] = {token.content: token for token in declared.values()}
        named = {name: known.get(str(token), token) if name in NAMES else token for name, token in self.named.items()}
        return _Specials(named, self.extra)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files in ``directory``: ``tokenizer_config.json``, ``config.json``, and ``tokenizer.json`` as text."""

    directory: Path
    settings: dict[str, Any]
    model: dict[str, Any]
    content: str

    @classmethod
    def read(cls, directory: Path) -> _Files:
        path = directory / _TOKENIZER
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the router tokenizes with it")
        settings = read_json_object(directory / _SETTINGS, required=False)
        if settings.get("fast_tokenizer_files") not in (None, [], [_TOKENIZER]):
            raise CheckpointError(f"{directory / _SETTINGS}: fast_tokenizer_files: only {_TOKENIZER} is supported")
        model = read_json_object(directory / "config.json", required=False)
        try:
            return cls(directory, settings, model, path.read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def tokenizer_class(self) -> TokenizerClass:
        """Return the class transformers takes. Raises CheckpointError if that is not known here."""
        declared = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        model_type = self.model.get("model_type")
        for key, value in (("tokenizer_class", declared), ("model_type", model_type)):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"{self.directory}: {key} should be text, not {value!r:.80}")
        name = class_name(declared, model_type, byte_level='"ByteLevel"' in self.content)
        if name in UNSUPPORTED:
            raise CheckpointError(
                f"{self.directory / _SETTINGS}: tokenizer_class {declared!r} is not supported; if {_TOKENIZER} says "
                "all there is, write PreTrainedTokenizerFast"
            )
        return CLASSES.get(name, BACKEND)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of ``tokenizer.json``."""
        with self._naming_errors():
            return Tokenizer.from_str(self.content)

    def rebuilt(self, tokenizer: Tokenizer, build: Builder) -> Tokenizer:
        """Return what ``build`` makes of the file's vocabulary and merges, with the post-processor of ``tokenizer``."""
        if not isinstance(tokenizer.model, models.BPE):
            raise CheckpointError(f"{self.directory / _TOKENIZER}: model should be BPE, which tokenizer_class needs")
        with self._naming_errors():
            model = json.loads(self.content)["model"]
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            merges = [(left, right) for left, right in pairs]
            built = build(partial(models.BPE, vocab=model["vocab"], merges=merges), self.settings)
        built.post_processor = tokenizer.post_processor
        return built

    def added_tokens(self, tokenizer: Tokenizer) -> dict[int, AddedToken]:
        """Return the added tokens by id: of the settings if they have any, else of the file and the older files."""
        if self._declares_tokens:
            return self._by_id(_SETTINGS, self.settings["added_tokens_decoder"].items())
        specials = {str(token) for token in self.special_tokens({}).named.values()}
        older = read_json_object(self.directory / _OLDER_TOKENS, required=False)
        flags = {text: {"special": text in specials, "normalized": text not in specials} for text in older}
        added = self._by_id(_OLDER_TOKENS, ((older[text], {"content": text, **flags[text]}) for text in older))
        return dict(sorted({**added, **tokenizer.get_added_tokens_decoder()}.items()))

    def check_ids(self, tokenizer: Tokenizer, declared: Mapping[int, AddedToken]) -> None:
        """Raise CheckpointError if a declared token did not get its id."""
        name = _SETTINGS if self._declares_tokens else _OLDER_TOKENS
        for token_id, token in declared.items():
            found = tokenizer.token_to_id(token.content)
            if found != token_id:
                raise CheckpointError(
                    f"{self.directory / name}: token {token.content!r} should have the id {token_id}, but with the "
                    f"vocabulary of {_TOKENIZER} it gets {found}"
                )

    def _by_id(self, name: str, tokens: Iterable[tuple[Any, Any]]) -> dict[int, AddedToken]:
        path = self.directory / name
        try:
            return {int(token_id): _token(token, path, "added tokens") for token_id, token in tokens}
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: added tokens should have ids: {error}") from error

    @property
    def _declares_tokens(self) -> bool:
        return isinstance(self.settings.get("added_tokens_decoder"), dict)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # tokenizers raises bare Exception for a file it cannot read, and this BaseException if its own code fails
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{self.directory / _TOKENIZER} cannot be read: {error}") from error

    def special_tokens(self, defaults: Mapping[str, str], extra: Iterable[str] = ()) -> _Specials:
        """Return the special tokens of the files, and ``defaults`` for names that have none.

        ``special_tokens_map.json`` counts if the settings declare no added tokens.
        """
        path = self.directory / _SETTINGS
        own = _specials(self.settings, path)
        if not self._declares_tokens:
            path = self.directory / "special_tokens_map.json"
            content = read_json_object(path, required=False)
            older = _specials(content, path, special=True)
            standard = {name: token for name, token in older.named.items() if name in NAMES}
            extended = [*own.extra, *older.extra] if content.get("extra_special_tokens") else own.extra or older.extra
            own = _Specials({**older.named, **own.named, **standard}, extended)
        absent = {name: text for name, text in defaults.items() if name not in self.settings}
        named = {**absent, **own.named}
        ordered = {name: named[name] for name in (*NAMES, *named) if name in named}
        return _Specials(ordered, [*own.extra, *extra])


def _defaults(kind: TokenizerClass, tokenizer: Tokenizer) -> dict[str, str]:
    padding = {"pad_token": tokenizer.padding["pad_token"]} if tokenizer.padding else {}
    return {name: text for name, text in {**padding, **kind.special_tokens}.items() if text is not None}


def _specials(settings: Mapping[str, Any], path: Path, **flags: bool) -> _Specials:
    """Return the special tokens that one file names."""
    named: dict[str, Token] = {
        key: _special(value, path, key, flags)
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    key = "extra_special_tokens" if settings.get("extra_special_tokens") else "additional_special_tokens"
    extra = settings.get(key) or []
    if isinstance(extra, dict):
        return _Specials({**named, **{name: _special(token, path, key, flags) for name, token in extra.items()}}, [])
    if not isinstance(extra, list):
        raise CheckpointError(f"{path}: {key} should be a list or an object, not {extra!r:.80}")
    return _Specials(named, [_special(token, path, key, flags) for token in extra])


def _special(value: object, path: Path, key: str, flags: Mapping[str, bool]) -> Token:
    return value if isinstance(value, str) else _token(value, path, key, **flags)


def _token(value: object, path: Path, key: str, **flags: bool) -> AddedToken:
    """Return a token that a file gives as an object. Raises CheckpointError."""
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{path}: {key} should hold tokens with their content, not {value!r:.80}")
    given = {flag: bool(value[flag]) for flag in _FLAGS if value.get(flag) is not None}
    return AddedToken(value["content"], **{**given, **flags})


def _add_tokens(tokenizer: Tokenizer, declared: Mapping[int, AddedToken], specials: _Specials, *, plain: bool) -> None:
    """Add what the tokenizer does not have yet, in the order in which transformers gives out ids.

    ``plain``: special tokens lose their flags.
    """
    names = {str(token) for token in specials.named.values()}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in declared.values()}
    missing = [token for token in (*specials.named.values(), *specials.extra) if str(token) not in known]
    tokens = [_flagged(token, names) for token in (*declared.values(), *missing)]
    tokenizer.add_tokens(tokens)
    if plain:
        everything = dict.fromkeys(map(str, (*specials.named.values(), *specials.extra)))
        tokenizer.add_tokens([AddedToken(text, special=True) for text in everything])


def _flagged(token: Token, names: Iterable[str]) -> AddedToken:
    """Return ``token`` as one that is special if it has a name."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if token.content in names:
        token.special = True
    return token


def _begin(tokenizer: Tokenizer, specials: _Specials | None) -> processors.TemplateProcessing:
    """Return what puts ``bos_token`` before a text, or nothing."""
    begin = str(specials.named["bos_token"]) if specials and "bos_token" in specials.named else None
    if begin is None:
        return processors.TemplateProcessing(single="$A", special_tokens=[])
    return processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
