"""Patch the simulator's objects with a hash code that is consistent with their `equals`.

`EnvObject` compares ids but is hashed by identity, so sets of objects are iterated in random order. The order
affects what a room lists first, where objects are, and what a thermometer reads. With a hash by id, which is
numbered from the start in every game, the order is always the same, at no cost.
"""

import struct
from pathlib import Path
from zipfile import ZipFile

CLASS = "scienceworld/struct/EnvObject.class"

_TEXT, _LONG, _DOUBLE, _METHOD, _PAIR = 1, 5, 6, 10, 12
# Bytes of a constant after its tag, by tag.
_SIZES = dict.fromkeys((7, 8, 16, 19, 20), 2) | {15: 3} | dict.fromkeys((3, 4, 9, 10, 11, 12, 17, 18), 4)
_SIZES |= dict.fromkeys((_LONG, _DOUBLE), 8)
_PUBLIC = 1


def write_patch(jar: Path, folder: Path) -> None:
    """Write the patched class to a folder, which must precede the jar on the class path."""
    with ZipFile(jar) as archive:
        data = archive.read(CLASS)
    file = folder / CLASS
    file.parent.mkdir(parents=True)
    file.write_bytes(with_hash_code(data))


def with_hash_code(data: bytes) -> bytes:
    """Add `public int hashCode() { return (int) uuid(); }` to a class file, unless it has a `hashCode`."""
    count, end, texts = _constants(data)
    if b"hashCode" in texts:
        return data
    this = data[end + 2 : end + 4]
    names = (b"hashCode", b"()I", b"Code", b"uuid", b"()J")
    method, signature, code, uuid, gives_long = range(count, count + 5)
    pair, call = count + 5, count + 6
    constants = b"".join(_pack("BH", _TEXT, len(name)) + name for name in names)
    constants += _pack("BHH", _PAIR, uuid, gives_long) + _pack("B", _METHOD) + this + _pack("H", pair)
    # aload_0, invokevirtual uuid, l2i, ireturn: two words of stack, one local variable
    body = b"\x2a\xb6" + _pack("H", call) + b"\x88\xac"
    attribute = _pack("HHI", 2, 1, len(body)) + body + _pack("HH", 0, 0)
    made = _pack("HHHHHI", _PUBLIC, method, signature, 1, code, len(attribute)) + attribute
    interfaces = end + 6
    fields = interfaces + 2 + 2 * _short(data, interfaces)
    methods = _after_members(data, fields)
    after = _after_members(data, methods)
    return b"".join(
        (
            *(data[:8], _pack("H", call + 1), data[10:end], constants, data[end:methods]),
            *(_pack("H", _short(data, methods) + 1), data[methods + 2 : after], made, data[after:]),
        )
    )


def _constants(data: bytes) -> tuple[int, int, set[bytes]]:
    """Return the number of constant slots, the offset of their end, and the texts among them."""
    count, at, slot, texts = _short(data, 8), 10, 1, set()
    while slot < count:
        tag = data[at]
        size = _SIZES.get(tag, 0)
        if tag == _TEXT:
            size = 2 + _short(data, at + 1)
            texts.add(data[at + 3 : at + 1 + size])
        at += 1 + size
        slot += 2 if tag in (_LONG, _DOUBLE) else 1
    return count, at, texts


def _after_members(data: bytes, at: int) -> int:
    """Return the offset of the end of a table of fields or methods."""
    members, at = _short(data, at), at + 2
    for _ in range(members):
        attributes, at = _short(data, at + 6), at + 8
        for _ in range(attributes):
            at += 6 + int(struct.unpack_from(">I", data, at + 2)[0])
    return at


def _short(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">H", data, at)[0])


def _pack(fields: str, *values: int) -> bytes:
    return struct.pack(f">{fields}", *values)
