"""The laws of the house, read from the source with `ast`: who imports whom, what is never called, how large things are."""

import ast
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "mlx", "mlx_lm"}
MODULES = [path for folder in ("config", "utils", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
BACKENDS = sorted((ROOT / "utils" / "backends").glob("*_backend.py"))
SCHEMA = ROOT / "config" / "structured_config.py"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
Function = ast.FunctionDef | ast.AsyncFunctionDef
# What a section is called by the code that reads it: `recipe.data.overlong`, `data.overlong`, `self.training.packing`.
SECTION_OWNERS = {
    "ModelSection": {"model"},
    "ScratchSection": {"scratch"},
    "DataSection": {"data"},
    "LoraSection": {"lora"},
    "TrainingSection": {"training"},
    "DpoSection": {"dpo"},
    "KtoSection": {"kto"},
    "OrpoSection": {"orpo"},
    "RewardSection": {"reward"},
    "GenerationSection": {"generation"},
    "EvaluationSection": {"evaluation"},
    "TrackingSection": {"tracking"},
    "Recipe": {"recipe"},
}


def get_name(path: Path) -> str:
    """Dotted module name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def show(path: Path, node: ast.AST) -> str:
    """`file:line`, for messages."""
    return f"{path.relative_to(ROOT)}:{node.__dict__.get('lineno', 1)}"


def is_type_checking(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def list_targets(node: ast.AST) -> list[str]:
    """Modules that an import statement names; for `from a import b` both `a` and `a.b`, since `b` may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import on line {node.lineno}"
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def iterate_imports(path: Path) -> Iterator[tuple[ast.AST, str, bool]]:
    """Yields (statement, module, does it run when the module is imported) for every import but those for type checkers."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[ast.AST, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            for target in list_targets(child):
                yield child, target, at_top
            yield from walk(child, at_top and not isinstance(child, Function | ast.Lambda))

    return walk(TREES[path], True)


def iterate_functions(path: Path) -> Iterator[tuple[Function, ast.AST]]:
    """Yields every function of a file with what it stands in."""

    def walk(node: ast.AST) -> Iterator[tuple[Function, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, node
            yield from walk(child)

    return walk(TREES[path])


def iterate_calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Yields every call in our code with the dotted text of what is called."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def is_in(path: Path, *folders: str) -> bool:
    """True for a file below one of the folders, or one of the files, named relative to the repository."""
    return any(path.is_relative_to(ROOT / folder) for folder in folders)


def test_imports_go_downwards_only() -> None:
    wrong = []
    for path in MODULES:
        for node, target, _ in iterate_imports(path):
            top = target.split(".")[0]
            if (
                top in ("scripts", "tests", "data")
                or (is_in(path, "config") and top == "utils" and not target.startswith("utils.exceptions"))
                or (get_name(path) == "utils.exceptions" and top in ("config", "utils"))
            ):
                wrong.append(f"{show(path, node)} imports {target}")
    assert wrong == []


def test_back_ends_never_import_each_other_and_are_reached_through_the_one_door() -> None:
    names = {get_name(path) for path in BACKENDS}
    assert names
    assert [
        f"{show(path, node)} imports {target}"
        for path in MODULES
        for node, target, _ in iterate_imports(path)
        if target in names
    ] == []


def test_frameworks_are_imported_at_the_top_of_back_ends_only() -> None:
    wrong = [
        f"{show(path, node)} imports {target}"
        for path in MODULES
        for node, target, at_top in iterate_imports(path)
        if target.split(".")[0] in FRAMEWORKS
        and at_top
        and not is_in(path, "utils/backends", "utils/device_manager.py")
    ]
    assert wrong == []


def test_inside_functions_only_tokenizer_hub_datasets_and_the_schemas_conversions_import_a_framework() -> None:
    conversions = [
        node for node in ast.walk(TREES[SCHEMA]) if isinstance(node, Function) and node.name.startswith("to_")
    ]
    allowed = {id(inner) for function in conversions for inner in ast.walk(function)}
    wrong = []
    for path in MODULES:
        if is_in(path, "utils/backends", "utils/device_manager.py"):
            continue
        for node, target, at_top in iterate_imports(path):
            top = target.split(".")[0]
            is_light = (
                (top == "transformers" and is_in(path, "utils/tokenizer_files.py"))
                or (top == "datasets" and is_in(path, "utils/hub_datasets.py"))
                or (top in ("transformers", "peft") and id(node) in allowed)
            )
            if top in FRAMEWORKS and not at_top and not is_light:
                wrong.append(f"{show(path, node)} imports {target}")
    assert wrong == []


def test_light_modules_reach_no_framework_through_others() -> None:
    by_name = {get_name(path): path for path in MODULES}
    reached: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in reached:
            reached[name] = set()
            for _, target, at_top in iterate_imports(by_name[name]):
                if at_top and target.split(".")[0] in FRAMEWORKS:
                    reached[name].add(target)
                elif at_top and target in by_name:
                    reached[name] |= reach(target)
        return reached[name]

    heavy = {get_name(path) for path in MODULES if is_in(path, "utils/backends", "utils/device_manager.py")}
    light = [name for name in by_name if name not in heavy or name == "utils.backends"]
    assert {name: found for name in light if (found := reach(name))} == {}


def test_scripts_import_only_light_modules_before_the_recipe_is_read() -> None:
    numbers = {
        get_name(path) for path in MODULES for _, target, top in iterate_imports(path) if top and target == "numpy"
    }
    by_name = {get_name(path): path for path in MODULES}

    def reaches(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if name in numbers:
            return True
        inner = [target for _, target, top in iterate_imports(by_name[name]) if top and target in by_name]
        return any(reaches(target, seen | {name}) for target in inner if target not in seen)

    assert [get_name(path) for path in MODULES if is_in(path, "scripts") and reaches(get_name(path))] == []


def test_no_module_or_class_answers_for_attributes_that_it_does_not_have() -> None:
    names = ("__getattr__", "__getattribute__", "__setattr__")
    assert [show(path, f) for path in MODULES for f, _ in iterate_functions(path) if f.name in names] == []


def test_attributes_are_never_looked_up_by_text_outside_the_back_ends() -> None:
    assert [
        f"{show(path, call)} {ast.unparse(call)}"
        for path, call, name in iterate_calls()
        if name in ("getattr", "hasattr", "setattr", "delattr", "vars", "globals", "locals")
        and not is_in(path, "utils/backends")
    ] == []


def test_only_named_errors_are_caught() -> None:
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)} if node.type else {"bare"}
            if is_in(path, "utils/cli.py"):
                caught -= {"Exception"}
            if path.name == "tokenizer_files.py":
                caught -= {"Exception"}  # the tokenizers library raises that class itself
            if path.name == "torch_generation.py":
                caught -= {"BaseException"}  # handed to another thread and raised there
            if caught & {"bare", "Exception", "BaseException"}:
                wrong.append(show(path, node))
    assert wrong == []


def test_what_runs_foreign_code_is_never_called() -> None:
    forbidden = re.compile(
        r"^(eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)|subprocess\.(getoutput|getstatusoutput)"
        r"|(c?[pP]ickle|dill|joblib|marshal)\.\w+|torch\.(load|hub\.\w+)|yaml\.(unsafe_|full_)?load(_all)?"
        r"|yaml\.\w*UnsafeLoader|numpy\.load|np\.load|shutil\.unpack_archive|(\w+\.)*(push_to_hub|upload_\w+|create_repo)"
        r"|(jinja2\.)?(Environment|Template|NativeEnvironment|SandboxedEnvironment))$"
    )
    restarts = (ROOT / "utils" / "allocator.py", "os.execve")  # the running script itself, with the same arguments
    wrong = [
        f"{show(path, call)} {name}"
        for path, call, name in iterate_calls()
        if forbidden.match(name) and (path, name) != restarts
    ]
    wrong += [
        f"{show(path, call)} shell"
        for path, call, _ in iterate_calls()
        for keyword in call.keywords
        if keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
    ]
    imported = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
    wrong += [f"{show(p, n)} {t}" for p in MODULES for n, t, _ in iterate_imports(p) if t.split(".")[0] in imported]
    assert wrong == []


def test_every_load_says_whose_code_may_run() -> None:
    # A flag that is left out is None in some libraries, and None is not False: CVE-2026-86169.
    wrong, seen = [], 0
    for path, call, name in iterate_calls():
        owner, _, method = name.rpartition(".")
        if method not in ("from_pretrained", "from_config") or owner.startswith(("Peft", "recipe", "torch_")):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        seen += 1
        if given.get("trust_remote_code") not in ("False", "trusted", "recipe.model.trust_remote_code"):
            wrong.append(f"{show(path, call)} {name}")
    assert wrong == []
    assert seen >= 6


def check_budget(sizes: dict[str, int], budget: int, what: str) -> None:
    """Warns about what is over budget and fails at double."""
    over = {name: size for name, size in sizes.items() if size > budget}
    if over:
        warnings.warn(f"over the budget of {budget} {what}: {over}", stacklevel=2)
    assert {name: size for name, size in over.items() if size > 2 * budget} == {}


def count_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_scripts_modules_and_recipes_stay_small() -> None:
    sizes = {str(path.relative_to(ROOT)): count_lines(path) for path in MODULES}
    check_budget({name: size for name, size in sizes.items() if name.startswith("scripts")}, 80, "lines a script")
    check_budget({name: size for name, size in sizes.items() if not name.startswith("scripts")}, 300, "lines a module")
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    check_budget({path.name: count_lines(path) for path in recipes}, 60, "lines a recipe")


def test_functions_stay_small() -> None:
    lengths, counts = {}, {}
    for path in MODULES:
        for function, parent in iterate_functions(path):
            name = f"{show(path, function)} {function.name}"
            lengths[name] = (function.end_lineno or 0) - function.lineno + 1
            given = function.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            is_bound = isinstance(parent, ast.ClassDef) and bool(every) and every[0].arg in ("self", "cls")
            counts[name] = len(every) - is_bound
    check_budget(lengths, 40, "lines a function")
    check_budget(counts, 6, "parameters a function")


def test_no_script_hides_a_package() -> None:
    # `python scripts/evaluate.py` puts scripts/ first on sys.path, and every library's `import evaluate` would find it.
    stems = {path.stem for path in MODULES if is_in(path, "scripts")}
    assert stems
    ours = {"config", "utils", "scripts", "data", "tests"}
    assert not stems & set(sys.stdlib_module_names)
    assert not stems & (set(importlib.metadata.packages_distributions()) - ours)


def test_every_module_says_what_it_is_for() -> None:
    assert [str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(TREES[path])] == []


def test_every_script_shows_its_own_command() -> None:
    for path in MODULES:
        if is_in(path, "scripts"):
            lines = (ast.get_docstring(TREES[path]) or "").splitlines()
            assert any(line.strip().startswith(f"python scripts/{path.name}") for line in lines), path.name


def test_every_public_function_and_class_has_a_docstring() -> None:
    wrong = []
    for path in MODULES:
        for function, parent in iterate_functions(path):
            is_public = not function.name.startswith("_") and isinstance(parent, ast.Module | ast.ClassDef)
            if is_public and not ast.get_docstring(function):
                wrong.append(f"{show(path, function)} {function.name}")
        wrong += [
            f"{show(path, node)} {node.name}"
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert wrong == []


def test_every_function_is_annotated() -> None:
    wrong = []
    for path in MODULES:
        for function, parent in iterate_functions(path):
            given = function.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            if isinstance(parent, ast.ClassDef) and every and every[0].arg in ("self", "cls", "__self"):
                every = every[1:]
            if function.returns is None or any(argument.annotation is None for argument in every):
                wrong.append(f"{show(path, function)} {function.name}")
    assert wrong == []


def has_one_value(annotation: ast.expr) -> bool:
    """True for `Literal["sft"]`: with nothing to choose there is nothing to read."""
    if not isinstance(annotation, ast.Subscript):
        return False
    return ast.unparse(annotation.value) == "Literal" and isinstance(annotation.slice, ast.Constant)


def list_schema_fields() -> dict[str, list[str]]:
    """Section class → its keys that have more than one value."""
    return {
        node.name: [
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and not has_one_value(item.annotation)
        ]
        for node in TREES[SCHEMA].body
        if isinstance(node, ast.ClassDef) and node.name in SECTION_OWNERS
    }


def find_owner(node: ast.expr) -> str:
    """`data` for both `data.train` and `recipe.data.train`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def collect_reads() -> set[tuple[str, str]]:
    """Every (owner, attribute) that is read outside the schema, and what the schema's own conversions read of themselves."""
    reads = {
        (find_owner(node.value), node.attr)
        for path, tree in TREES.items()
        if path != SCHEMA
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for section in TREES[SCHEMA].body:
        if not isinstance(section, ast.ClassDef):
            continue
        for function in section.body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("to_"):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and find_owner(node.value) == "self":
                        reads |= {(owner, node.attr) for owner in SECTION_OWNERS.get(section.name, ())}
    return reads


def test_every_key_of_the_schema_does_something() -> None:
    # A key that nothing reads is accepted and does nothing: the worst kind of silence.
    reads = collect_reads()
    fields = list_schema_fields()
    assert set(fields) == set(SECTION_OWNERS)
    dead = [
        f"{section}.{name}"
        for section, names in fields.items()
        for name in names
        if not any((owner, name) in reads for owner in SECTION_OWNERS[section])
    ]
    assert dead == []


def describe_parameters(function: Function) -> list[tuple[str, str]]:
    """Names and kinds of a function's parameters, self left out."""
    given = function.args
    return [
        *((argument.arg, "positional") for argument in (*given.posonlyargs, *given.args) if argument.arg != "self"),
        *((argument.arg, "keyword") for argument in given.kwonlyargs),
    ]


def describe_functions(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Parameters of the functions that a file defines."""
    return {node.name: describe_parameters(node) for node in TREES[path].body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.stem)
def test_every_back_end_has_the_functions_of_the_protocol_with_the_same_parameters(path: Path) -> None:
    door = TREES[ROOT / "utils" / "backends" / "__init__.py"]
    protocol = next(node for node in door.body if isinstance(node, ast.ClassDef) and node.name == "Backend")
    wanted = {node.name: describe_parameters(node) for node in protocol.body if isinstance(node, ast.FunctionDef)}
    offered = describe_functions(path)
    for node in TREES[path].body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils.backends."):
            sibling = describe_functions(ROOT / f"{(node.module or '').replace('.', '/')}.py")
            offered |= {alias.name: sibling[alias.name] for alias in node.names if alias.name in sibling}
    assert len(wanted) >= 10
    assert {name: offered.get(name) for name in wanted} == wanted


def test_all_files_of_the_house_are_seen_by_these_tests() -> None:
    names = {get_name(path) for path in MODULES}
    assert {"config.structured_config", "utils.training_loop", "utils.backends", "scripts.train"} <= names
    assert BACKENDS


# Reached from the token path, but no token depends on them: messages, progress, downloads, and padding after the cache.
BESIDE_THE_TOKENS = {
    "utils.adapter_changes",
    "utils.adapter_formats",
    "utils.adapter_reader",
    "utils.adapter_settings",
    "utils.adapter_source",
    "utils.backends.embedded_model",
    "utils.batching",
    "utils.cache_entries",
    "utils.cache_keys",
    "utils.download_progress",
    "utils.downloads",
    "utils.exceptions",
    "utils.hub",
    "utils.logging",
    "utils.merge_plan",
    "utils.mlx_names",
    "utils.model_headers",
    "utils.model_safety",
    "utils.model_source",
    "utils.plain_adapters",
    "utils.problem_log",
    "utils.progress",
    "utils.tensor_files",
}


def test_the_token_caches_key_names_every_module_between_row_and_token() -> None:
    from utils.prepared_data import CODE

    paths = {get_name(path): path for path in MODULES}
    reached: set[str] = set()
    waiting = ["utils.prepared_data"]
    while waiting:
        name = waiting.pop()
        if name in paths and name not in reached:
            reached.add(name)
            waiting += [target for node in ast.walk(TREES[paths[name]]) for target in list_targets(node)]
    in_utils = {name for name in reached if name.startswith("utils.")}
    assert in_utils - BESIDE_THE_TOKENS == {f"utils.{name.replace('/', '.')}" for name in CODE}
