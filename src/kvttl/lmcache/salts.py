"""Cache salts: what keeps apart KV cache that equal token ids do not make equal.

LMCache 0.5.6 keys a chunk by token ids, model name and ``cache_salt``. A tenant's salt stays as
it is. Whatever else changes KV (a LoRA adapter, embeddings, images) is added as a digest of its
content: ``tenant~<32 hex digits>``.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

_MAX_SALT_CHARS, _FORBIDDEN = 128, frozenset("@/\\\0")  # vLLM's and LMCache's own limits
# Others are hashed: LMCache's disk tier has the salt in a file's name, of 255 bytes at most.
_PLAIN_SALT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MADE_SALT = re.compile(r"[A-Za-z0-9._-]{0,64}~[0-9a-f]{32}")
_WEIGHTS = (".json", ".safetensors", ".bin", ".pt")  # files of an adapter that change what it does


def check_salt(salt: Any) -> str:
    """Return a tenant's salt; None is none, an empty text.

    Raises
    ------
    ValueError
        What vLLM's server or LMCache refuses; in the engine it would end that.
    """
    if salt is None:
        return ""
    fits = isinstance(salt, str) and 0 < len(salt) <= _MAX_SALT_CHARS
    if not fits or _FORBIDDEN.intersection(salt):
        allowed = f"a text of 1 to {_MAX_SALT_CHARS} characters without @, /, \\ and NUL"
        raise ValueError(f"cache_salt must be {allowed}, got {salt!r:.150}")
    return salt


def salted(tenant: str, **content: Any) -> str:
    """Return the salt under which a tenant's KV with this `content` is kept.

    Parameters
    ----------
    tenant : str
        The tenant's own salt; empty = none.
    **content
        What else the KV depends on, by a name; None = nothing.

    Examples
    --------
    >>> salted(""), salted("tenant-a")
    ('', 'tenant-a')
    >>> salted("tenant-a", adapter="0123")
    'tenant-a~43188d666aa5fe52e333551b5e478e48'
    """
    content = {name: value for name, value in content.items() if value is not None}
    plain = _PLAIN_SALT.fullmatch(tenant)
    if not content and (plain or not tenant):
        return tenant
    text = json.dumps([tenant, content], sort_keys=True, default=_content_digest)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{tenant if plain else ''}~{digest}"


def kept_under(salt: str | None, **content: Any) -> str:
    """Return the salt of KV whose request carried `salt`, which `salted` may have made."""
    return salt if salt and _MADE_SALT.fullmatch(salt) else salted(salt or "", **content)


def chunk_key(chunk_hash: str, salt: str) -> str:
    """Name a chunk: equal tokens have equal hashes under every salt.

    Examples
    --------
    >>> chunk_key("00ff", ""), chunk_key("00ff", "tenant-a"), salt_of("00ff@tenant-a")
    ('00ff', '00ff@tenant-a', 'tenant-a')
    """
    return f"{chunk_hash}@{salt}" if salt else chunk_hash


def salt_of(key: str) -> str:
    """Return the salt in a chunk's key."""
    return key.partition("@")[2]


def adapter_content(lora_request: Any) -> dict[str, Any] | None:
    """Return what identifies a LoRA adapter's weights, whatever its name and number are.

    Raises
    ------
    ValueError
        Weights that cannot be read here: the engine would end when it loads them.
    """
    if lora_request is None:
        return None
    if getattr(lora_request, "tensorizer_config_dict", None):
        raise ValueError("tensorizer_config_dict of a lora_request is not possible: only a folder")
    from vllm.lora.utils import get_adapter_absolute_path  # it knows a hub's ids, too

    try:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
        stamps = [(file, file.stat()) for file in files]
    except OSError as error:
        raise ValueError(f"lora_path {lora_request.lora_path!r}: {error.strerror}") from error
    if not any(file.suffix != ".json" for file in files):
        raise ValueError(f"lora_path {lora_request.lora_path!r}: no weights are in this folder")
    stamps = tuple((f, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f, s in stamps)
    stacked = getattr(lora_request, "is_3d_lora_weight", False)
    return {"weights": _files_digest(stamps), "is_3d_lora_weight": stacked}


class LoadedAdapters(dict):
    """What an engine has loaded: an adapter's number -> its content."""

    def content_of(self, lora_request: Any) -> dict[str, Any] | None:
        """Return an adapter's content, as `adapter_content` does, and remember it.

        Raises
        ------
        ValueError
            Another one is under its number: it is that one which the engine uses.
        """
        if (content := adapter_content(lora_request)) is None:
            return None
        number, in_place = lora_request.lora_int_id, getattr(lora_request, "load_inplace", False)
        if self.get(number, content) != content and not in_place:
            raise ValueError(
                f"lora_int_id {number} of {lora_request.lora_name!r} is not possible: the engine "
                "has other weights under this number; take a new one, or load_inplace=True"
            )
        self[number] = content
        return content


@functools.lru_cache(maxsize=256)
def _files_digest(stamps):
    """Digest files; what they were when they were read last is part of the question."""
    digest = hashlib.sha256()
    for path, *_ in stamps:
        with open(path, "rb") as file:
            digest.update(f"{path.name} ".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _content_digest(value):
    """Return a digest of what JSON has no word for: tensors, arrays, images."""
    from vllm.multimodal.hasher import MultiModalHasher

    return MultiModalHasher.hash_kwargs("sha256", item=value)
