from .effects import Attribution as Attribution
from .filters import FilterEffects as FilterEffects
from .filters import filter_effects as filter_effects
from .filters import filter_movement as filter_movement
from .images import attribute as attribute
from .refining import attribute_fine as attribute_fine
from .scores import check_dims as check_dims
from .scores import compares_classes as compares_classes
