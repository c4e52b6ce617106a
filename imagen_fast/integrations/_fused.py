"""What fused blocks have in common, and when one may read a child's parameters instead of calling it.

A fused block computes what its original computes, but does the work of some children itself, from their parameters.
That must not be seen from outside: a hook, a parametrization or an adapter on such a child, added before or after, has
to work as it does in the original. So every call looks at the children first, and one that is not plain is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

from .. import ops
from ..ops.attention import WIDEST
from ..reference.attention import attention as eager_attention
from ..reference.group_norm_act import ACTIVATIONS
from ._kept import drop

# The last two are what a plain tensor is while it is traced.
_PLAIN_TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer, type(None), FakeTensor, FunctionalTensor))


class Fused(nn.Module):
    """Mixin of the fused classes, which stand first among a class's bases and before the original.

    A module gets and loses its fused form by changing class, so a fused class adds no state of its own. It is defined
    at the top of an importable module, so that copies and pickles of a module keep it.

    Attributes:
        original: the class that it takes the place of.
        form: the class in which `original` is set; others derive from it.
        ops: the names of the ops that it calls.
        reads: the children whose parameters it reads, and the class that they must be of exactly.
        parameters_read: of those children.
        packs: whether this is a single layer on packed weights: a form of that very class alone, taken for inference,
            and none that anybody would miss.
        caches_text: whether it keeps what it computes from the text alone; taken for inference, if that is wanted.
        names: the last parts of the names of the modules that may take this form; all if there are none.
        keeps_dtype: parameters that keep their dtype in a model that computes in another one (`_converted`).
    """

    original: ClassVar[type[nn.Module]]
    form: ClassVar[type[Fused]]
    ops: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False
    caches_text: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Mapping[str, type[nn.Module]]] = {}
    parameters_read: ClassVar[tuple[str, ...]] = ("weight", "bias")
    keeps_dtype: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "forward" in vars(cls):  # first, as a library may wrap it too, and ask whether its own stands outermost
            cls.forward = _while_fused(cls.forward)  # type: ignore[method-assign]
        super().__init_subclass__()
        if "original" in vars(cls):
            cls.form = cls

    @classmethod
    def joined(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """The linear layers whose weights it keeps in one copy on a device other than the CPU, since it gives all of
        them the same tensor; works before it has the form, too."""
        return ()

    @staticmethod
    def compared(result: Any) -> Any:
        """The part of a result, its own or the original's, that `verify` compares: what both have in the same form."""
        return result

    @classmethod
    def obstacles(cls, module: nn.Module) -> list[str]:
        """What keeps a module in this form from using its ops everywhere; works before it has the form, too."""
        found = []
        for name, expected in cls.reads.items():
            child = module.get_submodule(name)
            reason = why_called(child, expected, cls.parameters_read)
            if reason is not None:
                found.append(f"{name} ({type(child).__name__}) is called as it is: {reason}")
        return found


def _while_fused(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward for a module that somebody may still call by it when the module has got its own class back."""

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Fused):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return run


class FusedMethod:
    """One method of a whole object, whose class is written into saved files: it gets an attribute of the method's
    name, an instance of this, and keeps its class. A deep copy of the object, and what is made of its pickle, has a
    copy of this, bound to it; a shallow copy (`copy.copy`) has this very one, bound to the original.

    Attributes:
        original: the class whose method it takes the place of.
        method: its name.
        ops: the names of the ops that it calls.
        subclasses: whether it also serves subclasses that have the method unchanged.
        recordable: whether a CUDA graph may hold what it does: it keeps nothing.
    """

    original: ClassVar[type]
    method: ClassVar[str]
    ops: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False
    caches_text: ClassVar[bool] = False
    subclasses: ClassVar[bool] = False
    recordable: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @classmethod
    def why_left(cls, owner: Any) -> str | None:
        """What about the object this cannot do, or None."""
        return None

    @classmethod
    def obstacles(cls, owner: Any) -> list[str]:
        """As of `Fused`."""
        return []

    def forget(self) -> None:
        """Drop what was computed from the object, to be computed anew."""


Form = type[Fused] | type[FusedMethod]


# ---- Changing form


def has_form(obj: object, form: Form) -> bool:
    """Whether a module, or another object, is in a fused form."""
    if issubclass(form, FusedMethod):
        return isinstance(vars(obj).get(form.method), form)
    return next((cls for cls in type(obj).__mro__ if "original" in vars(cls)), None) is form


def take_form(module: Any, cls: type) -> None:
    """Give the module another class, also where the instance holds on to a method of the one that it has.

    Libraries that wrap `forward` on an instance (Hugging Face's accelerate, diffusers' hooks) keep the bound method to
    call it later.
    """
    if issubclass(cls, FusedMethod):
        hold(module, cls.method, cls(module))
        return
    methods = [(holder, _methods_in(holder, module)) for holder in _holders(module)]
    module.__class__ = cls
    for holder, held in methods:
        for key, method in held.items():
            holder[key] = getattr(cls, method).__get__(module)


def give_back(module: Any) -> None:
    """Give a fused module the class that it had, and an object its class's methods; leave any other."""
    forget(module)
    if isinstance(module, Fused):
        take_form(module, _original_class(module))
    for holder in _holders(module):
        _drop_methods(module, holder)


def hold(module: Any, key: str, method: FusedMethod) -> None:
    """Have an object hold a method of its own under some name."""
    vars(module)[key] = method
    if isinstance(module, nn.Module):
        vars(module)[_Replicate.method] = _Replicate(module)


def let_go(module: Any, key: str, method: FusedMethod) -> None:
    """The opposite."""
    _put_back(module, vars(module), key, method)
    left = [value for value in vars(module).values() if isinstance(value, FusedMethod)]
    if [*map(type, left)] == [_Replicate]:
        del vars(module)[_Replicate.method]


def _drop_methods(module: Any, holder: dict[str, Any]) -> None:
    """All that are held there."""
    for name, value in list(holder.items()):
        if isinstance(value, FusedMethod):
            _put_back(module, holder, name, value)


def _put_back(module: Any, holder: dict[str, Any], key: str, method: FusedMethod) -> None:
    """Its class's method, by name where it would be found anyway."""
    if holder is vars(module) and key == method.method:
        del holder[key]
    else:
        holder[key] = getattr(type(module), method.method).__get__(module)


class _Replicate(FusedMethod):
    """How `nn.DataParallel` copies a module: with all its attributes, of which the methods would be the original's."""

    original = nn.Module
    method = "_replicate_for_data_parallel"
    ops = ()

    def __call__(self) -> Any:
        replica = type(self.owner)._replicate_for_data_parallel(self.owner)
        _drop_methods(replica, vars(replica))
        return replica


def forget(obj: Any) -> None:
    """Have an object drop what it keeps, or what is kept beside it."""
    if isinstance(obj, nn.Module):
        drop(obj)
    for value in list(vars(obj).values()):
        if isinstance(value, FusedMethod):
            value.forget()


def _holders(module: Any) -> list[dict[str, Any]]:
    """Where methods of the module may be held to be called later: its attributes, and the chain of diffusers' hooks."""
    hooks = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())
    return [vars(module), *map(vars, hooks)]


def own_methods(module: nn.Module) -> dict[str, str]:
    """The methods of its class that the instance itself holds, bound to it: attribute and name of the method."""
    return _methods_in(vars(module), module)


def replaced(module: nn.Module, *names: str) -> str | None:
    """The first of these methods in whose place the instance holds something else, or None."""
    held = vars(module)
    if not any(name in held for name in names):
        return None
    own = own_methods(module)
    return next((name for name in names if name in held and own.get(name) != name), None)


def _methods_in(holder: Mapping[str, Any], module: nn.Module) -> dict[str, str]:
    return {
        key: value.__name__
        for key, value in holder.items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__ is getattr(type(module), value.__name__, None)
    }


def _original_class(module: Fused) -> type[nn.Module]:
    cls = type(module)
    if "original" in vars(cls):
        return cls.original
    # A parametrization that came later: `parametrize` has derived a class for this instance from the fused one, with a
    # property for each parametrized tensor.
    return type(f"Parametrized{cls.original.__name__}", (cls.original,), dict(vars(cls)))


# ---- Reading children


def why_called(
    child: nn.Module, expected: type[nn.Module], parameters_read: tuple[str, ...] = ("weight", "bias")
) -> str | None:
    """Why `child` must be called, or None where reading its parameters amounts to the same.

    The child is exactly of the expected class, or in the fused form of that class.

    This runs at every call of a fused block, so it asks for little more than a microsecond, and `torch.compile` traces
    it. Dynamo ignores hooks that are added after compilation, here as in any module.
    """
    own = type(child)  # a parametrized module has a class of its own
    if own is not expected and (getattr(own, "form", None) is not own or own.original is not expected):
        return f"it is not exactly a {expected.__name__}"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "it has hooks"
    held = child.__dict__
    if "forward" in held and replaced(child, "forward"):
        return "its forward is replaced"
    if "_conv_forward" in held and replaced(child, "_conv_forward"):  # of a convolution, for pictures without seams
        return "its _conv_forward is replaced"
    if _module._has_any_global_hook():
        return "there are hooks on all modules"
    parameters = child._parameters
    for name in parameters_read:
        if name not in parameters:  # a buffer or an attribute has taken its name
            return f"its {name} is not a parameter"
    for parameter in parameters.values():
        if type(parameter) not in _PLAIN_TENSORS:
            return "its parameters are of a tensor subclass"
    return None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether none of them is of a tensor subclass (quantized, distributed), for which an op may have no rule."""
    for tensor in tensors:  # noqa: SIM110  # at every call; a loop takes half the time of `all`
        if type(tensor) not in _PLAIN_TENSORS:
            return False
    return True


def activation_name(child: nn.Module) -> str | None:
    """What `ops.group_norm_act` calls the activation that `child` is; None where it must be called."""
    if type(child) is nn.SiLU and why_called(child, nn.SiLU, ()) is None:
        return "silu"
    if type(child) is nn.GELU and why_called(child, nn.GELU, ()) is None:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(child.approximate)
    return None


def group_norm_act(
    norm: nn.Module, x: Tensor, activation: str | None, *, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """`activation(norm(x) * (1 + scale) + shift)` by the op where `norm` can be read, else by calling `norm`.

    Args:
        norm: a child that is an `nn.GroupNorm` as long as nobody replaces it.
        x: (B, C, positions...).
        activation: as the op's.
        scale, shift: (B, C), both or neither.
    """
    if why_called(norm, nn.GroupNorm) is None and is_plain(x, scale, shift):
        assert isinstance(norm, nn.GroupNorm)
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        return ops.group_norm_act(
            x, norm.num_groups, weight, bias, scale=scale, shift=shift, activation=activation, eps=norm.eps
        )
    h = norm(x)
    if scale is not None and shift is not None:
        positions = (...,) + (None,) * (h.dim() - 2)
        h = h * (1 + scale[positions]) + shift[positions]
    return ACTIVATIONS[activation](h)


def is_head_width(width: int) -> bool:
    """Whether `ops.attention` takes heads of this width."""
    return 0 < width <= WIDEST and width % 8 == 0


def attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`ops.attention`, or its plain form where one of q, k, v and the context is of a tensor subclass."""
    run = ops.attention if is_plain(q, k, v, arguments.get("context_k")) else eager_attention
    return run(q, k, v, **arguments)
