"""What a user can call says the types of what it takes, and that it does."""

import importlib.resources
import inspect

import keras_rgd

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def is_ours(value):
    return getattr(value, "__module__", "").startswith("keras_rgd")


def plain(member):
    """The function behind a member of a class, or `None`."""
    if isinstance(member, property):
        return member.fget
    member = inspect.unwrap(getattr(member, "__func__", member))
    return member if inspect.isfunction(member) else None


def methods(cls):
    """The public functions of a class and its bases here, by the name that they are called by."""
    for base in filter(is_ours, cls.__mro__):
        for name, member in vars(base).items():
            function = plain(member)
            if function is not None and (name == "__init__" or not name.startswith("_")):
                yield f"{cls.__name__}.{name}", function


def public_functions(module=keras_rgd):
    """The functions of the package and of its public modules, by name."""
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.ismodule(value) or is_ours(value)):
            continue
        if inspect.isclass(value):
            yield from methods(value)
        elif inspect.isfunction(value):
            yield name, value
        elif module is keras_rgd:
            yield from public_functions(value)


def test_every_public_parameter_has_a_type():
    missing = [
        f"{name}({parameter.name})"
        for name, function in public_functions()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
        and parameter.kind not in VARIADIC
        and parameter.annotation is parameter.empty
    ]
    assert missing == []


def test_every_public_result_has_a_type():
    missing = [
        name
        for name, function in public_functions()
        if not name.endswith(".__init__")
        and inspect.signature(function).return_annotation is inspect.Signature.empty
    ]
    assert missing == []


def test_the_public_functions_are_found():
    names = {name for name, _ in public_functions()}
    assert {
        "spectrum",
        "RGD.direction",
        "Geometry.christoffel",
        "DiffusionMonitor.__init__",
    } <= names


def test_type_checkers_are_told_of_the_types():
    assert (importlib.resources.files("keras_rgd") / "py.typed").is_file()
