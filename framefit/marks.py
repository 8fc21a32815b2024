"""The marks inside every file: what it was made with, and that a machine made it.

Three statements, in one XMP packet that all formats can hold and that is found by scanning (XMP part 3, section 2):

- the parameters, as JSON, with the frame rate and count that a folder of images or a GIF cannot state;
- IPTC DigitalSourceType = trainedAlgorithmicMedia (https://iptc.org/std/photometadata/specification);
- the AIGC label of GB 45438-2025, annex E, under the name that the TC260 practice guides give it.

Knows bytes and text only: `video` puts them into files. Equal parameters give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from mmap import mmap
from typing import Any
from uuid import UUID
from xml.etree import ElementTree
from xml.sax.saxutils import escape

__all__ = [
    "TAGS",
    "TRAINED_ALGORITHMIC_MEDIA",
    "find",
    "gif_extension",
    "packet",
    "parameters",
    "properties",
    "statements",
    "uuid_box",
]

TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

# Properties that MP4 also states as metadata tags: ffmpeg keeps tags when it remuxes, and drops the XMP box.
TAGS = {"Parameters": "framefit", "AIGC": "AIGC"}

_NAMESPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "TC260": "http://www.tc260.org.cn/ns/AIGC/1.0/",
    "framefit": "urn:framefit:xmp:1.0/",
}
_PREFIXES = {
    "DigitalSourceType": "Iptc4xmpExt",
    "AIGC": "TC260",
    "Parameters": "framefit",
    "FrameRate": "framefit",
    "NumFrames": "framefit",
}
_BEGIN, _END = b"<?xpacket begin=", b'<?xpacket end="w"?>'
_MAX_PACKET_BYTES = 2**24  # more is not ours, and is not worth parsing
_XMP_BOX = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")


def properties(parameters: dict[str, Any], *, fps: float, num_frames: int) -> dict[str, str]:
    """All statements about one video, by name; `parameters` must be JSON."""
    # ASCII, so that no tool on the way can mistake the encoding and no character is illegal in XML.
    text = json.dumps(parameters, sort_keys=True)
    return {
        "DigitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
        "AIGC": _aigc(hashlib.sha256(text.encode()).hexdigest()[:32]),
        "Parameters": text,
        "FrameRate": repr(fps),
        "NumFrames": str(num_frames),
    }


def packet(properties: dict[str, str]) -> bytes:
    """The properties as an XMP packet."""
    namespaces = "".join(f' xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items())
    elements = "".join(f"<{_PREFIXES[n]}:{n}>{escape(text)}</{_PREFIXES[n]}:{n}>" for n, text in properties.items())
    return (
        _BEGIN + b'"\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        + f'<rdf:Description rdf:about=""{namespaces}>{elements}</rdf:Description>'.encode()
        + b"</rdf:RDF></x:xmpmeta>"
        + _END
    )


def find(data: bytes | mmap) -> dict[str, str]:
    """The properties in a file's bytes, from its last XMP packet; empty where there is none to be read."""
    begin = data.rfind(_BEGIN)
    end = data.find(_END, begin)
    if begin < 0 or not begin < end <= begin + _MAX_PACKET_BYTES:
        return {}
    try:
        root = ElementTree.fromstring(data[begin:end])
    except ElementTree.ParseError:
        return {}
    texts = {name: root.findtext(f".//{{{_NAMESPACES[prefix]}}}{name}") for name, prefix in _PREFIXES.items()}
    return {name: text for name, text in texts.items() if text}


def parameters(properties: dict[str, str]) -> dict[str, Any] | None:
    """The parameters among the properties, or None."""
    try:
        found = json.loads(properties.get("Parameters", ""))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def statements(properties: dict[str, str]) -> dict[str, str]:
    """What the properties say of the video's origin: DigitalSourceType and AIGC."""
    return {name: properties[name] for name in ("DigitalSourceType", "AIGC") if name in properties}


def uuid_box(packet: bytes) -> bytes:
    """The packet as a top-level box of an MP4."""
    return struct.pack(">I4s16s", 24 + len(packet), b"uuid", _XMP_BOX.bytes) + packet


def gif_extension(packet: bytes) -> bytes:
    """The packet as an application extension of a GIF."""
    # A reader that takes the text for length-prefixed blocks lands, wherever it leaves the text, on the final zero.
    trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"
    return b"\x21\xff\x0bXMP DataXMP" + packet + trailer


def _aigc(produce_id: str) -> str:
    label = {
        "Label": "1",  # "1": it is generated, as opposed to possibly ("2") or suspected ("3")
        "ContentProducer": "framefit",
        "ProduceID": produce_id,
        "ReservedCode1": "",
        "ContentPropagator": "",
        "PropagateID": "",
        "ReservedCode2": "",
    }
    return json.dumps(label, separators=(",", ":"))
