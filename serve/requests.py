"""The one contract behind every front door: what a caller asks for and what comes back.

A field left out takes the model's own default; `serve.models.ModelSpec.resolve` fills it in and
checks what only the model knows (largest size, name).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from serve.errors import InvalidRequest, NotSupportedYet
from serve.intervals import Interval
from serve.lora_choice import Loras
from serve.tenants import DEFAULT_TENANT

Sampler = Literal["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"]
Scheduler = Literal["normal", "simple", "sgm_uniform", "beta"]
OutputFormat = Literal["png", "jpeg", "webp"]
ForwardPath = Literal["graph", "eager", "mixed"]

LONGEST_PROMPT = 10_000
LARGEST_SEED = 2**64 - 1
HIGHEST_PRIORITY = 10
LARGEST_NUM_IMAGES = 16
DEFAULT_STRENGTH = 0.6  # diffusers' own

# Jobs journalled when priority was a reserved field say null.
Priority = Annotated[int, BeforeValidator(lambda value: 0 if value is None else value)]

_PROMPT = f"UTF-8 text of at most {LONGEST_PROMPT} characters"
_SIZE = "a multiple of 16, within the model's limits; the model's default if absent"
# In characters; of base64 that is 24 MiB of picture.
LONGEST_INIT_IMAGE = 32 << 20


class GenerateRequest(BaseModel):
    """One request for one or more pictures of one prompt.

    `guidance_interval` is Kynkäänniemi et al. 2024, "Applying guidance in a limited interval":
    outside it a step costs one row instead of two. `negative_prompt_range` is what Stability AI's
    own SD3 workflow does with [0, 0.1] (ComfyUI: ConditioningSetTimestepRange,
    ConditioningZeroOut).

    With `init_image` sampling starts from that picture, noised to where the last `strength` of the
    steps begins, as diffusers' StableDiffusion3Img2ImgPipeline does. It is brought to width x
    height: scaled to cover them, and what stands out is cut off on both sides alike. Where neither
    is given, they are the picture's own, rounded down to multiples of 16, and smaller where the
    model draws nothing so large; of one alone, the other is the model's default. Transparency is
    dropped. The resolved request names a copy of what came of it, which lives as long as the job.

    Raises:
        InvalidRequest: On construction, naming the field, the value and what is allowed.
        NotSupportedYet: A reserved field was given.
    """

    # Instances are checked again wherever one is taken: `model_copy(update=...)` checks nothing,
    # and what comes by handle was built in another process.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, revalidate_instances="always"
    )

    prompt: str = Field(
        min_length=1, max_length=LONGEST_PROMPT, description=f"{_PROMPT}, not empty"
    )
    prompt_2: str | None = Field(
        None, max_length=LONGEST_PROMPT, description=f"{_PROMPT}, for CLIP-G; prompt if absent"
    )
    prompt_3: str | None = Field(
        None, max_length=LONGEST_PROMPT, description=f"{_PROMPT}, for T5; prompt if absent"
    )
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT, description=_PROMPT)
    negative_prompt_2: str | None = Field(
        None, max_length=LONGEST_PROMPT, description=f"{_PROMPT}; negative_prompt if absent"
    )
    negative_prompt_3: str | None = Field(
        None, max_length=LONGEST_PROMPT, description=f"{_PROMPT}; negative_prompt if absent"
    )
    width: int | None = Field(None, ge=16, multiple_of=16, description=_SIZE)
    height: int | None = Field(None, ge=16, multiple_of=16, description=_SIZE)
    num_inference_steps: int | None = Field(
        None, ge=1, le=200, description="an integer from 1 to 200; the model's default if absent"
    )
    guidance_scale: float | None = Field(
        None,
        ge=0.0,
        le=100.0,
        allow_inf_nan=False,
        description="a finite number from 0 to 100; 1 or less runs without guidance; "
        "the model's default if absent",
    )
    sampler: Sampler | None = Field(
        None, description="one of: euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde"
    )
    scheduler: Scheduler | None = Field(
        None, description="one of: normal, simple, sgm_uniform, beta"
    )
    shift: float | None = Field(
        None,
        gt=0.0,
        le=100.0,
        allow_inf_nan=False,
        description="a finite number above 0, at most 100; the model's default if absent",
    )
    max_sequence_length: int | None = Field(
        None, ge=1, le=512, description="T5 tokens, 1 to 512; the model's default if absent"
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=LARGEST_SEED,
        description=f"an integer from 0 to {LARGEST_SEED}; drawn at acceptance if absent; "
        "picture i of a request takes seed + i, modulo 2**64",
    )
    num_images: int = Field(
        1,
        ge=1,
        le=LARGEST_NUM_IMAGES,
        description=f"an integer from 1 to {LARGEST_NUM_IMAGES}",
    )
    output_format: OutputFormat = Field("png", description="one of: png, jpeg, webp")
    quality: int = Field(90, ge=1, le=100, description="jpeg and webp quality, 1 to 100")
    model: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="a model this service has; its only one if absent",
    )
    embed_prompt: bool = Field(
        True, description="true or false: write the prompts into the picture's metadata"
    )

    guidance_interval: Interval | None = Field(
        None,
        description="[low, high], on the command line LOW,HIGH with a comma; 0 <= low < high <= 1: "
        "guidance only at noise levels (sigmas) within; everywhere if absent",
    )
    negative_prompt_range: Interval = Field(
        (0.0, 1.0),
        description="[start, end], on the command line LOW,HIGH with a comma; "
        "0 <= start < end <= 1: the share of sampling in which the negative prompt holds; zeros "
        "take its place outside",
    )
    loras: Loras = Field(
        (),
        description="a list of {name, weight}: LoRAs of the model, at most 8, each once; weight is "
        "a finite number from -10 to 10, 1 if absent",
    )
    preview_every: int = Field(
        0, ge=0, le=200, description="steps between previews, 0 to 200; 0 is without previews"
    )
    priority: Priority = Field(
        0,
        ge=-HIGHEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description=f"an integer from {-HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}; higher goes first",
    )
    deadline_s: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="a finite number of seconds above 0, from acceptance; the job fails once they "
        "are over; no deadline if absent",
    )

    idempotency_key: str | None = Field(
        None,
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="1 to 255 printable ASCII characters: the same request under the same key is "
        "the same job",
    )

    init_image: str | None = Field(
        None,
        min_length=1,
        max_length=LONGEST_INIT_IMAGE,
        repr=False,
        description="the PNG, JPEG or WebP picture to start from: base64, a data: URI, or the "
        "s3:// URI of a picture or upload of one's own; other URLs are not fetched",
    )
    strength: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="a number above 0, at most 1: the share of the steps that init_image goes "
        f"through; {DEFAULT_STRENGTH:g} if absent; without init_image leave it out",
    )
    tenant: Any = Field(None, description="the API key says it; leave it out")

    RESERVED: ClassVar[tuple[str, ...]] = ("tenant",)

    @classmethod
    def allowed(cls) -> dict[str, str]:
        """Return field name -> what is allowed there, in words."""
        return {name: field.description or "" for name, field in cls.model_fields.items()}

    @model_validator(mode="wrap")
    @classmethod
    def _typed_errors(
        cls, data: Any, handler: ModelWrapValidatorHandler["GenerateRequest"]
    ) -> "GenerateRequest":
        # Raised here rather than at each door, so that the handle and HTTP cannot differ. Errors
        # that are no ValueError pass through pydantic as they are.
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            # Pydantic would list all unknown fields: of a body's hundred thousand for a second.
            name = str(next(name for name in data if name not in cls.model_fields))
            raise InvalidRequest.unknown_field(name, data.get(name), cls.allowed())
        try:
            request = handler(data)
        except ValidationError as error:
            raise InvalidRequest.from_validation(error, cls.allowed()) from None
        if not request.prompt.strip():
            raise InvalidRequest(
                "Field 'prompt' is empty.",
                field="prompt",
                value=request.prompt,
                allowed=cls.allowed()["prompt"],
            )
        if request.strength is not None and request.init_image is None:
            raise InvalidRequest(
                "Field 'strength' is of no use without init_image.",
                field="strength",
                value=request.strength,
                allowed=cls.allowed()["strength"],
            )
        for name in cls.RESERVED:
            if (value := getattr(request, name)) is not None:
                raise NotSupportedYet(
                    f"Field {name!r} is not supported yet.",
                    field=name,
                    value=value,
                    allowed=cls.allowed()[name],
                )
        return request


class ImageRef(BaseModel):
    """One stored picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    s3_uri: str
    url: str = Field(description="presigned; expires after the configured time")
    sha256: str = Field(description="of the stored bytes, hexadecimal")
    size_bytes: int
    width: int
    height: int
    output_format: OutputFormat
    seed: int


class Upload(BaseModel):
    """A picture sent beforehand, for requests to start from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    init_image: str = Field(description="s3:// URI, as the field of that name takes it")
    sha256: str = Field(description="of the file as it came, hexadecimal")
    size_bytes: int
    width: int = Field(description="as it is meant to be seen: EXIF may turn it")
    height: int


class StageReport(BaseModel):
    """What one stage did for one request, as it reports itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Literal["text", "encode", "denoise", "decode", "store"]
    replica: str = Field(description="replica id of the process that did the work")
    pid: int
    precision: str = Field(description="what the weights and the arithmetic were")
    queue_s: float = Field(description="seconds waited inside the replica")
    seconds: float = Field(description="seconds of work inside the replica")
    image: int | None = Field(None, description="picture index, where the stage works per picture")
    path: ForwardPath | None = Field(
        None, description="denoise: its forwards were CUDA graphs, ran kernel by kernel, or both"
    )
    tokens: int | None = Field(
        None, description="text: of the prompt, as T5 counts them; CLIP-G where there is no T5"
    )
    joules: float | None = Field(
        None, description="denoise: this picture's share of its card's energy, where known"
    )
    moves: int = Field(0, description="denoise: times that the picture went on in another replica")
    steps_repeated: int = Field(0, description="denoise: steps done again because of that")


class GenerateResult(BaseModel):
    """A finished job. `request` is fully resolved: sending it again makes the same pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    model: str
    request: GenerateRequest
    images: tuple[ImageRef, ...]
    stages: tuple[StageReport, ...]
    seconds: float = Field(description="from acceptance to published, in seconds")
    joules: float | None = Field(
        None, description="of denoising all pictures, by the cards' counters; null if not known"
    )
    warnings: tuple[str, ...] = ()


EventName = Literal["queued", "text", "step", "decode", "stored", "failed", "cancelled"]


class JobEvent(BaseModel):
    """One line of a job's progress; the last one is stored, failed or cancelled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event: EventName
    id: str
    image: int | None = Field(None, description="picture index for step and decode")
    step: int | None = Field(None, description="steps finished, for step")
    steps: int | None = Field(None, description="steps in all, for step")
    path: ForwardPath | None = Field(None, description="how this step's forward ran, for step")
    preview: str | None = Field(
        None,
        description="base64 of a JPEG, one pixel for 8 x 8 of the picture; for every "
        "preview_every-th step but the last",
    )
    result: GenerateResult | None = Field(None, description="for stored")
    error: dict[str, Any] | None = Field(None, description="the error body, for failed")

    @property
    def is_last(self) -> bool:
        """True for the event that ends a job."""
        return self.event in ("stored", "failed", "cancelled")


JobStatus = Literal["pending", "running", "succeeded", "failed", "cancelled"]


class JobRecord(BaseModel):
    """What `GET /v1/jobs/{id}` answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tenant: str = Field(DEFAULT_TENANT, description="whose it is; nobody else finds it")
    status: JobStatus
    request: GenerateRequest | None = Field(
        None, description="resolved; null only where it was on record and cannot be read any more"
    )
    result: GenerateResult | None = None
    error: dict[str, Any] | None = None
    progress: JobEvent | None = Field(
        None, description="the newest event, where known, with the newest preview so far"
    )
    durable: bool = Field(
        True, description="false where the service keeps no journal: it dies with its process"
    )

    @property
    def is_over(self) -> bool:
        """True once nothing can change how the job ended."""
        return self.status in ("succeeded", "failed", "cancelled")


class JobPage(BaseModel):
    """What `GET /v1/jobs` answers: some of the caller's jobs, newest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs: tuple[JobRecord, ...]
    next: str | None = Field(
        None, description="`after` of the next page; null where there are no older jobs"
    )
