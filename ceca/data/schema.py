"""Arrow schemas of every shared table, and how keys are made.

A reader that meets another schema version stops with an error. Keys are deterministic: the same input gives the same
ids.
"""

import hashlib

import pyarrow as pa

SCHEMA_VERSION = 2
NOBODY = -1  # identity of an image whose person is not known
_FP16 = pa.float16()

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("camera", pa.string()),
        pa.field("image", pa.binary(), nullable=False),  # encoded, unchanged
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source_path", pa.string(), nullable=False),
    ]
)

# Further columns of IMAGES where the source says when a picture was taken, and in which tracklet: a camera's pictures
# of one person who walks by. Where they are missing, they are read as null.
TIME = pa.field("time", pa.timestamp("us", tz="UTC"))
TRACKLET = pa.field("tracklet", pa.string())

CAPTIONS = pa.schema(
    [
        pa.field("caption_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("identity", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)

# Ground truth of drawn pedestrians. Methods must not read it.
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
        pa.field(
            "attributes", pa.map_(pa.string(), pa.string()), nullable=False
        ),  # structured answers, if they were asked for
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # reasons to check the answers before using them
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        pa.field("generation_settings", pa.string(), nullable=False),  # JSON
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
    ]
)

# Further columns of DIALOGUES whose summary may be written from those of several images of one person: the image's own
# summary, and these images. Both are null where `summary` is the image's own. If one of the images is erased, `summary`
# becomes the image's own, and the list is empty.
OWN_SUMMARY = pa.field("own_summary", pa.string())
SUMMARY_OF = pa.field("summary_of", pa.list_(pa.string()))

# What an engine says about images: whether an attribute has a value (ceca/dialogue/verdicts.py).
VERDICTS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("attribute", pa.string(), nullable=False),
        pa.field("value", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
    ]
)

# What approximate search finds of the best images of exact search, for an ω (ceca/search/recall.py).
RECALL = pa.schema(
    [
        pa.field("omega", pa.float64(), nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("queries", pa.int32(), nullable=False),
        pa.field("recall", pa.float64(), nullable=False),
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
    """Schema of a gallery: an image's global and local embedding, each L2-normalised.

    Args:
        global_dim: width of the global embedding.
        local_dim: width of the local embedding.
        precision: number type of both.
    """
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
    """Schema of images added one by one: one row holds all data of an image. An unknown identity is `NOBODY`.

    Args:
        global_dim: width of the global embedding.
        local_dim: width of the local embedding.
    """
    dialogue = [DIALOGUES.field(name) for name in ("turns", "summary", "attributes", "flags")]
    embedded = [gallery(global_dim, local_dim).field(name) for name in ("global", "local")]
    return pa.schema([*IMAGES, *dialogue, pa.field("dialogue_model", pa.string(), nullable=False), *embedded, TIME])


def queries(global_dim: int, local_dim: int, precision: pa.DataType = _FP16) -> pa.Schema:
    """Schema of embedded captions, the queries of an evaluation; each embedding is L2-normalised.

    Args:
        global_dim: width of the global embedding.
        local_dim: width of the local embedding.
        precision: number type of both.
    """
    return pa.schema(
        [
            pa.field("caption_id", pa.string(), nullable=False),
            pa.field("identity", pa.int64(), nullable=False),
            pa.field("global", pa.list_(precision, global_dim), nullable=False),
            pa.field("local", pa.list_(precision, local_dim), nullable=False),
        ]
    )


def image_id(source_path: str) -> str:
    """Key of an image: the first 16 hex digits of the SHA-256 of its path below imgs/."""
    return hashlib.sha256(source_path.encode()).hexdigest()[:16]


def caption_id(image: str, position: int) -> str:
    """Key of a caption: `<image key>-<position>`.

    Args:
        image: key of the caption's image.
        position: the caption's position in the record it was read from.
    """
    return f"{image}-{position}"


def image_of(caption: str) -> str:
    """Key of the image that a caption key belongs to."""
    return caption.rpartition("-")[0]
