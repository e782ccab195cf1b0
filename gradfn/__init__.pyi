# The public names. `gradfn/__init__.py` imports each from here when it is first used.

from . import (
    attribution as attribution,
)
from . import (
    curvature as curvature,
)
from . import (
    data as data,
)
from . import (
    layers as layers,
)
from . import (
    per_example as per_example,
)
from . import (
    train as train,
)
from .core.names import ParameterError as ParameterError
from .core.names import tap as tap
from .core.net import Net as Net
from .core.net import repeat as repeat
from .core.net import residual as residual
from .core.net import serial as serial
from .core.params import (
    Param as Param,
)
from .core.params import (
    check as check,
)
from .core.params import (
    count as count,
)
from .core.params import (
    init as init,
)
from .core.params import (
    shapes as shapes,
)
from .core.params import (
    table as table,
)
from .inspection import (
    Backward as Backward,
)
from .inspection import (
    ChainRule as ChainRule,
)
from .inspection import (
    GradCheck as GradCheck,
)
from .inspection import (
    Inspection as Inspection,
)
from .inspection import (
    NanReport as NanReport,
)
from .inspection import (
    backprop as backprop,
)
from .inspection import (
    chain_rule as chain_rule,
)
from .inspection import (
    check_grads as check_grads,
)
from .inspection import (
    inspect as inspect,
)
from .inspection import (
    nan_guard as nan_guard,
)
from .inspection import (
    nan_origin as nan_origin,
)
from .inspection import (
    patch as patch,
)
from .inspection import (
    sites as sites,
)
from .losses import (
    accuracy as accuracy,
)
from .losses import (
    batch_mean as batch_mean,
)
from .losses import (
    classification_loss as classification_loss,
)
from .losses import (
    next_token_loss as next_token_loss,
)
from .losses import (
    quadratic_loss as quadratic_loss,
)
from .losses import (
    regression_loss as regression_loss,
)
from .nets import (
    GPTConfig as GPTConfig,
)
from .nets import (
    LanguageModel as LanguageModel,
)
from .nets import (
    ViTConfig as ViTConfig,
)
from .nets import (
    cnn as cnn,
)
from .nets import (
    generate as generate,
)
from .nets import (
    gpt as gpt,
)
from .nets import (
    hidden_width as hidden_width,
)
from .nets import (
    load_gpt2 as load_gpt2,
)
from .nets import (
    load_llama as load_llama,
)
from .nets import (
    mlp as mlp,
)
from .nets import (
    rnn as rnn,
)
from .nets import (
    save_pretrained as save_pretrained,
)
from .nets import (
    stack_blocks as stack_blocks,
)
from .nets import (
    stream as stream,
)
from .nets import (
    unstack_blocks as unstack_blocks,
)
from .nets import (
    vit as vit,
)
from .train import (
    CheckpointError as CheckpointError,
)
from .train import (
    Fit as Fit,
)
from .train import (
    TrainState as TrainState,
)
from .train import (
    fit as fit,
)
from .train import (
    stalled as stalled,
)
from .train import (
    train_state as train_state,
)
from .train import (
    train_step as train_step,
)

__version__: str
