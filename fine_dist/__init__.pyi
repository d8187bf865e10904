# Types of the names that __init__.py imports when they are first used.
from fine_dist.api import Model as Model
from fine_dist.api import condense as condense
from fine_dist.api import evaluate as evaluate
from fine_dist.api import initialise as initialise
from fine_dist.api import load as load

__version__: str
