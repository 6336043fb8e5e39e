"""Options of a run: what they are called, mean and may be, and how presets fill them."""

from cerl.config.envs import AtariEnv as AtariEnv
from cerl.config.envs import CatchEnv as CatchEnv
from cerl.config.envs import DmcEnv as DmcEnv
from cerl.config.envs import EnvConfig as EnvConfig
from cerl.config.envs import GymEnv as GymEnv
from cerl.config.envs import MemoryEnv as MemoryEnv
from cerl.config.envs import MinAtarEnv as MinAtarEnv
from cerl.config.envs import Model as Model
from cerl.config.envs import MujocoEnv as MujocoEnv
from cerl.config.envs import ObserveConfig as ObserveConfig
from cerl.config.envs import PointMassEnv as PointMassEnv
from cerl.config.envs import PopgymEnv as PopgymEnv
from cerl.config.errors import ConfigError as ConfigError
from cerl.config.load import load as load
from cerl.config.load import validated as validated
from cerl.config.options import Config as Config
from cerl.config.options import EnsembleConfig as EnsembleConfig
from cerl.config.options import EvalConfig as EvalConfig
from cerl.config.options import ExploreConfig as ExploreConfig
from cerl.config.options import LogConfig as LogConfig
from cerl.config.options import LossConfig as LossConfig
from cerl.config.options import NetConfig as NetConfig
from cerl.config.options import OptimConfig as OptimConfig
from cerl.config.options import ReplayConfig as ReplayConfig
from cerl.config.options import ScheduleConfig as ScheduleConfig
from cerl.config.options import SequenceConfig as SequenceConfig
