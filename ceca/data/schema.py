"""Arrow schemas of every shared table: the one place that names a column.

A reader that meets another schema version says so and stops. Keys are deterministic: the same input gives the
same ids.
"""

import hashlib

import pyarrow as pa

SCHEMA_VERSION = 2
NOBODY = -1  # identity of an image of which nobody said whose it is
_FP16 = pa.float16()

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("camera", pa.string()),
        pa.field("image", pa.binary(), nullable=False),  # encoded bytes as they came
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source_path", pa.string(), nullable=False),
    ]
)

CAPTIONS = pa.schema(
    [
        pa.field("caption_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)

# Ground truth of drawn pedestrians, kept apart from what a method may see.
ATTRIBUTES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("view", pa.string(), nullable=False),
        pa.field("lighting", pa.string(), nullable=False),
        pa.field("occluded", pa.bool_(), nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)

DIALOGUES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("turns", pa.list_(pa.struct([pa.field("question", pa.string()), pa.field("answer", pa.string())]))),
        pa.field("summary", pa.string(), nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string()), nullable=False),  # structured answers, if asked for
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # what to look at before the words are trusted
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        pa.field("generation_settings", pa.string(), nullable=False),  # JSON
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def gallery(global_dim: int, local_dim: int, precision: pa.DataType = _FP16) -> pa.Schema:
    """Schema of a gallery: both embeddings of an image, each L2-normalised."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("identity", pa.int64(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("global", pa.list_(precision, global_dim), nullable=False),
            pa.field("local", pa.list_(precision, local_dim), nullable=False),
            pa.field("model_digest", pa.string(), nullable=False),
        ]
    )


def added(global_dim: int, local_dim: int) -> pa.Schema:
    """Schema of an image that was added alone: everything that is known of it in one row. Without an identity, -1."""
    told = [DIALOGUES.field(name) for name in ("turns", "summary", "attributes", "flags")]
    embedded = [gallery(global_dim, local_dim).field(name) for name in ("global", "local")]
    return pa.schema([*IMAGES, *told, pa.field("dialogue_model", pa.string(), nullable=False), *embedded])


def queries(global_dim: int, local_dim: int, precision: pa.DataType = _FP16) -> pa.Schema:
    """Schema of embedded captions, as evaluation compares them with a gallery."""
    return pa.schema(
        [
            pa.field("caption_id", pa.string(), nullable=False),
            pa.field("identity", pa.int64(), nullable=False),
            pa.field("global", pa.list_(precision, global_dim), nullable=False),
            pa.field("local", pa.list_(precision, local_dim), nullable=False),
        ]
    )


def image_id(source_path: str) -> str:
    """An image's key: the first 16 hex digits of the SHA-256 of its path below imgs/."""
    return hashlib.sha256(source_path.encode()).hexdigest()[:16]


def caption_id(image: str, position: int) -> str:
    """A caption's key: its image's key and its position in the record."""
    return f"{image}-{position}"


def image_of(caption: str) -> str:
    """The key of a caption's image."""
    return caption.rpartition("-")[0]
