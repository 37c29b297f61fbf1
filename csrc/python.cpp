// The Python module speckv.kernels._C: the ops as plain functions, for where nobody could tell. The dispatcher's way
// from Python to an op and back takes 5 to 10 us, as long as the op itself on a small vocabulary; through DLPack's
// exchange it is 2 to 4. What else is to see the op, or knows it by other tensors, is sent on to the dispatcher: modes,
// tracers and profilers, and arguments that are not CPU tensors of exactly the type torch.Tensor with unit stride.

#include <exception>
#include <optional>
#include <vector>

#include "exchange.h"
#include "ops.h"

namespace speckv {
namespace {

// A function of Python without arguments: somebody watches where it gives not 0. PyTorch's own are called past Python.
struct Watcher {
    PyObject* function;
    PyCFunction native;  // null where it is none
    PyObject* self;

    bool watches() const {
        PyObject* const found = native != nullptr ? native(self, nullptr) : PyObject_CallNoArgs(function);
        const int is_true = found == nullptr ? 1 : PyObject_IsTrue(found);
        Py_XDECREF(found);
        return is_true != 0;
    }
};
std::vector<Watcher> watchers;

bool is_open = false;

void leave_if_watched() {
    for (const Watcher& watcher : watchers) {
        if (watcher.watches()) {
            PyErr_Clear();
            throw NotForUs{};
        }
    }
}

std::optional<View> view_if_any(PyObject* object) {
    return object == Py_None ? std::nullopt : std::optional(view_of(object));
}

double number(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw NotForUs{};
    }
    return value;
}

// An op: its name, how many arguments it takes, and what serves it where this way does not, once it is open.
struct Op {
    const char* name;
    Py_ssize_t arguments;
    PyObject* dispatched;
};
Op ops[] = {{"draft_sample", 6}, {"plan_gamma", 8}, {"draft_step", 15}, {"verify_chain", 9}};
enum : size_t { kDraftSample, kPlanGamma, kDraftStep, kVerifyChain };

PyObject* call_dispatched(const Op& op, PyObject* const* args, Py_ssize_t count) {
    if (op.dispatched == nullptr) {
        PyErr_Format(PyExc_RuntimeError, "%s: call open() first", op.name);
        return nullptr;
    }
    PyObject* const tuple = PyTuple_New(count);
    if (tuple == nullptr) {
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
    }
    PyObject* const result = PyObject_CallObject(op.dispatched, tuple);
    Py_DECREF(tuple);
    return result;
}

// Lets other threads of Python run meanwhile if there is work for longer than a tenth of a millisecond; giving the lock
// away and taking it back costs 0.06 us.
class Unlocked {
public:
    explicit Unlocked(int64_t logits) : state_(logits < kManyLogits ? nullptr : PyEval_SaveThread()) {}
    ~Unlocked() {
        if (state_ != nullptr) {
            PyEval_RestoreThread(state_);
        }
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    static constexpr int64_t kManyLogits = 1 << 19;
    PyThreadState* state_;
};

// Runs compute(first argument, outputs). The first argument is the largest; read() makes compute of the others.
template <class Read>
PyObject* call(const Op& op, PyObject* const* args, Py_ssize_t count, const Read& read) {
    PythonOutputs outputs;
    try {
        if (!is_open || count != op.arguments) {
            throw NotForUs{};
        }
        leave_if_watched();
        const View first = view_of(args[0]);
        const auto compute = read();
        {
            const Unlocked unlocked(first.elements());
            compute(first, outputs);
        }
        return outputs.take();
    } catch (const NotForUs&) {
        return call_dispatched(op, args, count);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

FilterViews filters_from(PyObject* const* args) {
    return {view_if_any(args[0]), view_if_any(args[1]), view_if_any(args[2])};
}

ControllerViews controller_from(PyObject* const* args) {
    return {view_of(args[0]), view_of(args[1]), view_of(args[2]),
            view_of(args[3]), view_of(args[4]), view_of(args[5]), number(args[6])};
}

PyObject* call_draft_sample(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(ops[kDraftSample], args, count, [&] {
        return [temperature = view_of(args[1]), uniform = view_of(args[2]),
                filters = filters_from(args + 3)](const View& logits, Outputs& outputs) {
            draft_sample(logits, temperature, uniform, filters, outputs);
        };
    });
}

PyObject* call_plan_gamma(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(ops[kPlanGamma], args, count, [&] {
        return [controller = controller_from(args + 1)](const View& signals, Outputs& outputs) {
            plan_gamma(signals, controller, outputs);
        };
    });
}

PyObject* call_draft_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(ops[kDraftStep], args, count, [&] {
        return [temperature = view_of(args[1]), uniform = view_of(args[2]), signals = view_of(args[3]),
                drafted = view_of(args[4]), controller = controller_from(args + 5),
                filters = filters_from(args + 12)](const View& logits, Outputs& outputs) {
            draft_step(logits, temperature, uniform, signals, drafted, controller, filters, outputs);
        };
    });
}

PyObject* call_verify_chain(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(ops[kVerifyChain], args, count, [&] {
        return [draft_logits = view_of(args[1]), draft_tokens = view_of(args[2]), num_draft = view_of(args[3]),
                temperature = view_of(args[4]), uniform = view_of(args[5]),
                filters = filters_from(args + 6)](const View& target_logits, Outputs& outputs) {
            verify_chain(
                target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, filters, outputs);
        };
    });
}

// open(type, watchers, dispatched): the type torch.Tensor, a tuple of functions that say whether somebody watches, and a
// dictionary of the ops. False where this PyTorch does not lend its tensors; every call then goes to the dispatcher.
PyObject* open(PyObject*, PyObject* args) {
    PyObject *type, *functions, *dispatched;
    if (PyArg_ParseTuple(args, "OO!O!", &type, &PyTuple_Type, &functions, &PyDict_Type, &dispatched) == 0) {
        return nullptr;
    }
    for (Op& op : ops) {
        PyObject* const overload = PyDict_GetItemString(dispatched, op.name);
        if (overload == nullptr) {
            PyErr_Format(PyExc_KeyError, "%s", op.name);
            return nullptr;
        }
        op.dispatched = Py_NewRef(overload);
    }
    watchers.clear();
    for (Py_ssize_t i = 0; i < PyTuple_Size(functions); ++i) {
        PyObject* const function = Py_NewRef(PyTuple_GetItem(functions, i));
        const bool is_native = PyCFunction_Check(function) && PyCFunction_GetFlags(function) == METH_NOARGS;
        watchers.push_back({function, is_native ? PyCFunction_GetFunction(function) : nullptr,
                            is_native ? PyCFunction_GetSelf(function) : nullptr});
    }
    is_open = open_exchange(type);
    return PyBool_FromLong(is_open);
}

template <PyObject* (*FUNCTION)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef op(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(FUNCTION)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace speckv

PyMODINIT_FUNC PyInit__C() {
    static PyMethodDef methods[] = {
        speckv::op<speckv::call_draft_sample>("draft_sample"),
        speckv::op<speckv::call_plan_gamma>("plan_gamma"),
        speckv::op<speckv::call_draft_step>("draft_step"),
        speckv::op<speckv::call_verify_chain>("verify_chain"),
        {"open", speckv::open, METH_VARARGS, nullptr},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
