//! A subscriber's filter: an expression of CEL (the Common Expression Language) that says which messages it wants.
//!
//! ```text
//! text ──crate cel──▶ its tree ──compiled once──▶ ours ──for each message──▶ matches │ does not
//!        on a stack of its own   unknown names refused     counted in steps
//! ```
//! The crate parses. What it parsed is evaluated here, over the payload as it lies: a client chooses both the
//! expression and the payload, and the crate's own evaluation has no bound (a macro over a large list, or one text
//! added to itself again and again, takes as long as it takes). Here each thing done is a step, and the steps are
//! counted. An expression that cannot be evaluated, because a field is missing or is of another type, does not match.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cel::Env;
use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue, SourceInfo, operators};
use serde_json::{Map, Value};

use crate::message::Headers;

/// The longest expression.
pub const TEXT_BYTES_MAX: usize = 4096;
/// How deep an expression may be nested. It bounds the stack of an evaluation, as the text's own bounds the parser's.
const DEPTH_MAX: usize = 32;
/// The stack to parse on: the crate descends without looking how much is left, and a stack that ends ends the process.
/// In a debug build a level of brackets takes it 120 KiB. What is not touched costs nothing.
const STACK_BYTES: usize = 64 << 20;
/// The most that one evaluation may do: enough for a macro over 50,000 elements, and a few milliseconds at most.
pub const STEPS_MAX: usize = 500_000;
/// How many bytes of text are compared, searched or joined in a step.
const BYTES_A_STEP: usize = 16;

/// An expression that can be evaluated.
#[derive(Debug)]
pub struct Filter {
    /// Its identity, which no other filter of this process has.
    pub no: u64,
    /// Whether the payload stands in it.
    pub wants_payload: bool,
    root: Node,
}

/// Why an expression is none, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter, line {line}, column {column}: {why}")]
pub struct FilterError {
    pub line: usize,
    pub column: usize,
    pub why: String,
}

/// What an expression sees.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub topic: &'a str,
    /// `null` where there is none.
    pub key: Option<&'a str>,
    pub headers: &'a Headers,
    /// `null` where the payload is not JSON.
    pub payload: &'a Value,
}

/// What came of an evaluation. Only `Matches` lets a message through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Matches,
    DoesNot,
    /// A field is missing, a type does not fit, or the result is neither true nor false.
    Failed,
    /// It would have taken more than `STEPS_MAX`.
    TooCostly,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Matches => "matches",
            Verdict::DoesNot => "does_not",
            Verdict::Failed => "failed",
            Verdict::TooCostly => "too_costly",
        }
    }
}

impl Filter {
    /// Waits for a thread of its own, for milliseconds.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        let whole = |why: String| FilterError { line: 1, column: 1, why };
        if text.len() > TEXT_BYTES_MAX {
            return Err(whole(format!("it has {} bytes, at most {TEXT_BYTES_MAX} are allowed", text.len())));
        }
        nesting(text)?;
        let owned = text.to_owned();
        let parsing = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || parse(&owned));
        let parsing = parsing.map_err(|error| whole(format!("there is no thread to parse it: {error}")))?;
        // The parser is generated code of others: a panic in it is the end of its thread and of nothing else.
        let (root, wants_payload) =
            parsing.join().unwrap_or_else(|_| Err(whole("the parser failed on it".to_owned())))?;
        static LAST: AtomicU64 = AtomicU64::new(0);
        Ok(Self { no: LAST.fetch_add(1, Relaxed) + 1, wants_payload, root })
    }

    pub fn evaluate(&self, subject: Subject<'_>) -> Verdict {
        self.count(subject).0
    }

    /// The verdict, and how many steps it took.
    fn count(&self, subject: Subject<'_>) -> (Verdict, usize) {
        let mut run = Run { subject, left: STEPS_MAX, bound: Vec::new() };
        let verdict = match run.value(&self.root) {
            Ok(Val::Bool(true)) => Verdict::Matches,
            Ok(Val::Bool(false)) => Verdict::DoesNot,
            Ok(_) | Err(Halt::Failed) => Verdict::Failed,
            Err(Halt::TooCostly) => Verdict::TooCostly,
        };
        (verdict, STEPS_MAX - run.left)
    }
}

/// Refuses what would take the parser deeper than its stack: it goes a level down for each bracket and conditional.
fn nesting(text: &str) -> Result<(), FilterError> {
    let (mut brackets, mut conditionals) = (0_usize, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => brackets += 1,
            ')' | ']' | '}' => brackets = brackets.saturating_sub(1),
            '?' => conditionals += 1,
            _ => {}
        }
        if brackets + conditionals > DEPTH_MAX {
            return Err(at_byte(text, at, format!("nested deeper than {DEPTH_MAX} levels")));
        }
    }
    Ok(())
}

fn at_byte(text: &str, at: usize, why: impl Into<String>) -> FilterError {
    let before = &text[..text.floor_char_boundary(at)];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    FilterError { line, column, why: why.into() }
}

fn parse(text: &str) -> Result<(Node, bool), FilterError> {
    // Without the macros of the crate, which it would rewrite to loops: ours are calls like any other.
    let parser = Env::default().parser().enable_optional_syntax(false).error_recovery_limit(1);
    let (tree, places) = parser.parse_with_source_info(text).map_err(|errors| {
        let first = errors.errors.into_iter().next();
        let (pos, why) = first.map_or(((1, 1), "not an expression".to_owned()), |e| (e.pos, e.msg));
        FilterError { line: pos.0.max(1) as usize, column: pos.1.max(1) as usize, why }
    })?;
    let mut compiler = Compiler { text, places, scope: Vec::new(), depth: 0, wants_payload: false };
    let root = compiler.node(&tree)?;
    Ok((root, compiler.wants_payload))
}

#[derive(Debug)]
enum Node {
    Null,
    Bool(bool),
    Int(i128),
    Double(f64),
    Text(String),
    List(Vec<Node>),
    Topic,
    Key,
    Headers,
    Payload,
    /// What a macro has bound, counted from the outermost.
    Bound(usize),
    Select(Box<Node>, String),
    Has(Box<Node>, String),
    Index(Box<(Node, Node)>),
    /// Both have to be looked at unless the first decides: `&&` by false, `||` by true.
    Logic {
        decides: bool,
        sides: Box<(Node, Node)>,
    },
    Not(Box<Node>),
    Negate(Box<Node>),
    Conditional(Box<(Node, Node, Node)>),
    Equal {
        negated: bool,
        sides: Box<(Node, Node)>,
    },
    Order(fn(Ordering) -> bool, Box<(Node, Node)>),
    In(Box<(Node, Node)>),
    Arithmetic(Arithmetic, Box<(Node, Node)>),
    Size(Box<Node>),
    Convert {
        to_double: bool,
        of: Box<Node>,
    },
    Search(Search, Box<(Node, Node)>),
    Quantified(Quantifier, Box<(Node, Node)>),
}

#[derive(Debug, Clone, Copy)]
enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
}

#[derive(Debug, Clone, Copy)]
enum Search {
    Contains,
    StartsWith,
    EndsWith,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Quantifier {
    All,
    Exists,
    ExistsOne,
}

/// Turns the crate's tree into ours, where everything that is named is known.
struct Compiler<'a> {
    text: &'a str,
    places: SourceInfo,
    /// The variables of the macros around.
    scope: Vec<String>,
    depth: usize,
    wants_payload: bool,
}

impl Compiler<'_> {
    fn node(&mut self, tree: &IdedExpr) -> Result<Node, FilterError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error(tree, format!("nested deeper than {DEPTH_MAX} levels")));
        }
        let node = match &tree.expr {
            Expr::Literal(literal) => match literal {
                LiteralValue::Null => Node::Null,
                LiteralValue::Boolean(value) => Node::Bool(*value.inner()),
                LiteralValue::Int(value) => Node::Int((*value.inner()).into()),
                LiteralValue::UInt(value) => Node::Int((*value.inner()).into()),
                LiteralValue::Double(value) => Node::Double(*value.inner()),
                LiteralValue::String(value) => Node::Text(value.inner().to_owned()),
                LiteralValue::Bytes(_) => return Err(self.error(tree, "bytes are not compared here")),
            },
            Expr::Ident(name) => self.named(tree, name)?,
            Expr::List(list) => {
                Node::List(list.elements.iter().map(|item| self.node(item)).collect::<Result<_, _>>()?)
            }
            Expr::Select(select) => Node::Select(self.boxed(&select.operand)?, select.field.clone()),
            Expr::Call(call) => self.call(tree, call)?,
            Expr::Map(_) | Expr::Struct(_) => return Err(self.error(tree, "maps are not made here")),
            Expr::Comprehension(_) | Expr::Unspecified => return Err(self.error(tree, "not an expression")),
        };
        self.depth -= 1;
        Ok(node)
    }

    fn named(&mut self, tree: &IdedExpr, name: &str) -> Result<Node, FilterError> {
        if let Some(bound) = self.scope.iter().rposition(|bound| bound == name) {
            return Ok(Node::Bound(bound));
        }
        match name {
            "topic" => Ok(Node::Topic),
            "key" => Ok(Node::Key),
            "headers" => Ok(Node::Headers),
            "payload" => {
                self.wants_payload = true;
                Ok(Node::Payload)
            }
            _ => {
                Err(self
                    .error(tree, format!("`{name}` is not known: there are topic, key, headers and payload")))
            }
        }
    }

    fn call(&mut self, tree: &IdedExpr, call: &CallExpr) -> Result<Node, FilterError> {
        let order = |of| Ok::<fn(Ordering) -> bool, FilterError>(of);
        Ok(match (call.func_name.as_str(), call.target.as_deref(), &call.args[..]) {
            (operators::LOGICAL_AND, None, [a, b]) => Node::Logic { decides: false, sides: self.pair(a, b)? },
            (operators::LOGICAL_OR, None, [a, b]) => Node::Logic { decides: true, sides: self.pair(a, b)? },
            (operators::LOGICAL_NOT, None, [a]) => Node::Not(self.boxed(a)?),
            (operators::NEGATE, None, [a]) => Node::Negate(self.boxed(a)?),
            (operators::CONDITIONAL, None, [a, b, c]) => {
                Node::Conditional(Box::new((self.node(a)?, self.node(b)?, self.node(c)?)))
            }
            (operators::EQUALS, None, [a, b]) => Node::Equal { negated: false, sides: self.pair(a, b)? },
            (operators::NOT_EQUALS, None, [a, b]) => Node::Equal { negated: true, sides: self.pair(a, b)? },
            (operators::LESS, None, [a, b]) => Node::Order(order(Ordering::is_lt)?, self.pair(a, b)?),
            (operators::LESS_EQUALS, None, [a, b]) => Node::Order(order(Ordering::is_le)?, self.pair(a, b)?),
            (operators::GREATER, None, [a, b]) => Node::Order(order(Ordering::is_gt)?, self.pair(a, b)?),
            (operators::GREATER_EQUALS, None, [a, b]) => {
                Node::Order(order(Ordering::is_ge)?, self.pair(a, b)?)
            }
            (operators::IN, None, [a, b]) => Node::In(self.pair(a, b)?),
            (operators::INDEX, None, [a, b]) => Node::Index(self.pair(a, b)?),
            (operators::ADD, None, [a, b]) => Node::Arithmetic(Arithmetic::Add, self.pair(a, b)?),
            (operators::SUBSTRACT, None, [a, b]) => Node::Arithmetic(Arithmetic::Subtract, self.pair(a, b)?),
            (operators::MULTIPLY, None, [a, b]) => Node::Arithmetic(Arithmetic::Multiply, self.pair(a, b)?),
            (operators::DIVIDE, None, [a, b]) => Node::Arithmetic(Arithmetic::Divide, self.pair(a, b)?),
            (operators::MODULO, None, [a, b]) => Node::Arithmetic(Arithmetic::Modulo, self.pair(a, b)?),
            ("size", None, [a]) | ("size", Some(a), []) => Node::Size(self.boxed(a)?),
            ("int", None, [a]) => Node::Convert { to_double: false, of: self.boxed(a)? },
            ("double", None, [a]) => Node::Convert { to_double: true, of: self.boxed(a)? },
            ("contains", Some(a), [b]) => Node::Search(Search::Contains, self.pair(a, b)?),
            ("startsWith", Some(a), [b]) => Node::Search(Search::StartsWith, self.pair(a, b)?),
            ("endsWith", Some(a), [b]) => Node::Search(Search::EndsWith, self.pair(a, b)?),
            ("has", None, [field]) => match &field.expr {
                Expr::Select(select) => Node::Has(self.boxed(&select.operand)?, select.field.clone()),
                _ => return Err(self.error(field, "has() takes a field, such as has(payload.n)")),
            },
            ("all", Some(list), [variable, body]) => {
                self.quantified(Quantifier::All, list, variable, body)?
            }
            ("exists", Some(list), [variable, body]) => {
                self.quantified(Quantifier::Exists, list, variable, body)?
            }
            ("exists_one", Some(list), [variable, body]) => {
                self.quantified(Quantifier::ExistsOne, list, variable, body)?
            }
            (name, ..) => {
                let why = format!(
                    "`{name}` is not known with these arguments: there are size, int, double, has, and .size, \
                     .contains, .startsWith, .endsWith, .all, .exists, .exists_one"
                );
                return Err(self.error(tree, why));
            }
        })
    }

    fn quantified(
        &mut self,
        quantifier: Quantifier,
        list: &IdedExpr,
        variable: &IdedExpr,
        body: &IdedExpr,
    ) -> Result<Node, FilterError> {
        let list = self.node(list)?;
        let Expr::Ident(name) = &variable.expr else {
            return Err(self.error(variable, "the first argument is the name of a variable"));
        };
        self.scope.push(name.clone());
        let body = self.node(body)?;
        self.scope.pop();
        Ok(Node::Quantified(quantifier, Box::new((list, body))))
    }

    fn boxed(&mut self, tree: &IdedExpr) -> Result<Box<Node>, FilterError> {
        self.node(tree).map(Box::new)
    }

    fn pair(&mut self, a: &IdedExpr, b: &IdedExpr) -> Result<Box<(Node, Node)>, FilterError> {
        Ok(Box::new((self.node(a)?, self.node(b)?)))
    }

    fn error(&self, tree: &IdedExpr, why: impl Into<String>) -> FilterError {
        // The crate counts characters.
        let start = self.places.offset_for(tree.id).map_or(0, |(start, _)| start as usize);
        let at = self.text.char_indices().nth(start).map_or(self.text.len(), |(at, _)| at);
        at_byte(self.text, at, why)
    }
}

/// A value on its way: what is in the message is borrowed from it.
#[derive(Debug, Clone)]
enum Val<'a> {
    Null,
    Bool(bool),
    /// Of i64 or u64, both of which JSON has.
    Int(i128),
    Double(f64),
    Text(Cow<'a, str>),
    Array(&'a [Value]),
    List(Rc<[Val<'a>]>),
    Object(&'a Map<String, Value>),
    Headers(&'a Headers),
}

enum Halt {
    Failed,
    TooCostly,
}

type Done<T> = Result<T, Halt>;

/// One evaluation.
struct Run<'a> {
    subject: Subject<'a>,
    left: usize,
    bound: Vec<Val<'a>>,
}

impl<'a> Run<'a> {
    fn steps(&mut self, count: usize) -> Done<()> {
        let Some(left) = self.left.checked_sub(count) else {
            self.left = 0;
            return Err(Halt::TooCostly);
        };
        self.left = left;
        Ok(())
    }

    fn value(&mut self, node: &'a Node) -> Done<Val<'a>> {
        self.steps(1)?;
        Ok(match node {
            Node::Null => Val::Null,
            Node::Bool(value) => Val::Bool(*value),
            Node::Int(value) => Val::Int(*value),
            Node::Double(value) => Val::Double(*value),
            Node::Text(text) => Val::Text(Cow::Borrowed(text)),
            Node::List(items) => {
                Val::List(items.iter().map(|item| self.value(item)).collect::<Done<Rc<[_]>>>()?)
            }
            Node::Topic => Val::Text(Cow::Borrowed(self.subject.topic)),
            Node::Key => self.subject.key.map_or(Val::Null, |key| Val::Text(Cow::Borrowed(key))),
            Node::Headers => Val::Headers(self.subject.headers),
            Node::Payload => of(self.subject.payload),
            Node::Bound(at) => self.bound.get(*at).cloned().ok_or(Halt::Failed)?,
            Node::Select(operand, field) => {
                let operand = self.value(operand)?;
                field_of(&operand, field)?.ok_or(Halt::Failed)?
            }
            Node::Has(operand, field) => {
                let operand = self.value(operand)?;
                Val::Bool(field_of(&operand, field)?.is_some())
            }
            Node::Index(sides) => match (self.value(&sides.0)?, self.value(&sides.1)?) {
                (Val::Array(items), Val::Int(at)) => {
                    usize::try_from(at).ok().and_then(|at| items.get(at)).map(of).ok_or(Halt::Failed)?
                }
                (Val::List(items), Val::Int(at)) => {
                    usize::try_from(at).ok().and_then(|at| items.get(at)).cloned().ok_or(Halt::Failed)?
                }
                (operand, Val::Text(field)) => field_of(&operand, &field)?.ok_or(Halt::Failed)?,
                _ => return Err(Halt::Failed),
            },
            Node::Logic { decides, sides } => {
                let first = self.truth(&sides.0);
                Val::Bool(self.joined(*decides, first, |run| run.truth(&sides.1))?)
            }
            Node::Not(of) => Val::Bool(!self.truth(of)?),
            Node::Negate(of) => match self.value(of)? {
                Val::Int(value) => whole(value.checked_neg())?,
                Val::Double(value) => Val::Double(-value),
                _ => return Err(Halt::Failed),
            },
            Node::Conditional(parts) => match self.truth(&parts.0)? {
                true => self.value(&parts.1)?,
                false => self.value(&parts.2)?,
            },
            Node::Equal { negated, sides } => {
                let (a, b) = (self.value(&sides.0)?, self.value(&sides.1)?);
                Val::Bool(self.equal(&a, &b)? != *negated)
            }
            Node::Order(holds, sides) => {
                let (a, b) = (self.value(&sides.0)?, self.value(&sides.1)?);
                // NaN is in no order with anything.
                Val::Bool(self.order(&a, &b)?.is_some_and(holds))
            }
            Node::In(sides) => {
                let (item, of) = (self.value(&sides.0)?, self.value(&sides.1)?);
                Val::Bool(self.holds(&of, &item)?)
            }
            Node::Arithmetic(what, sides) => {
                let (a, b) = (self.value(&sides.0)?, self.value(&sides.1)?);
                self.arithmetic(*what, a, b)?
            }
            Node::Size(of) => {
                let size = match self.value(of)? {
                    Val::Text(text) => {
                        self.steps(text.len() / BYTES_A_STEP)?;
                        text.chars().count()
                    }
                    Val::Array(items) => items.len(),
                    Val::List(items) => items.len(),
                    Val::Object(map) => map.len(),
                    Val::Headers(headers) => headers.len(),
                    _ => return Err(Halt::Failed),
                };
                Val::Int(size as i128)
            }
            Node::Convert { to_double, of } => {
                let value = self.value(of)?;
                if let Val::Text(text) = &value {
                    self.steps(text.len() / BYTES_A_STEP)?;
                }
                converted(&value, *to_double).ok_or(Halt::Failed)?
            }
            Node::Search(what, sides) => match (self.value(&sides.0)?, self.value(&sides.1)?) {
                (Val::Text(text), Val::Text(sought)) => {
                    self.steps((text.len() + sought.len()) / BYTES_A_STEP)?;
                    Val::Bool(match what {
                        Search::Contains => text.contains(&*sought),
                        Search::StartsWith => text.starts_with(&*sought),
                        Search::EndsWith => text.ends_with(&*sought),
                    })
                }
                _ => return Err(Halt::Failed),
            },
            Node::Quantified(quantifier, parts) => {
                let over = self.value(&parts.0)?;
                Val::Bool(self.quantified(*quantifier, &over, &parts.1)?)
            }
        })
    }

    fn truth(&mut self, node: &'a Node) -> Done<bool> {
        match self.value(node)? {
            Val::Bool(value) => Ok(value),
            _ => Err(Halt::Failed),
        }
    }

    /// Joins two truths: what decides, decides, even where the other side fails.
    fn joined(
        &mut self,
        decides: bool,
        first: Done<bool>,
        second: impl FnOnce(&mut Self) -> Done<bool>,
    ) -> Done<bool> {
        match first {
            Ok(value) if value == decides => Ok(decides),
            Ok(_) => second(self),
            Err(Halt::TooCostly) => Err(Halt::TooCostly),
            Err(Halt::Failed) => match second(self) {
                Ok(value) if value == decides => Ok(decides),
                Ok(_) => Err(Halt::Failed),
                Err(halt) => Err(halt),
            },
        }
    }

    fn quantified(&mut self, quantifier: Quantifier, over: &Val<'a>, body: &'a Node) -> Done<bool> {
        let mut items: Box<dyn Iterator<Item = Val<'a>> + '_> = match over {
            Val::Array(items) => Box::new(items.iter().map(of)),
            Val::List(items) => Box::new(items.iter().cloned()),
            Val::Object(map) => Box::new(map.keys().map(|key| Val::Text(Cow::Borrowed(key)))),
            Val::Headers(headers) => Box::new(headers.keys().map(|key| Val::Text(Cow::Borrowed(key)))),
            _ => return Err(Halt::Failed),
        };
        let holds = |run: &mut Self, item| {
            run.bound.push(item);
            let held = run.truth(body);
            run.bound.pop();
            held
        };
        if quantifier == Quantifier::ExistsOne {
            let mut found = 0;
            for item in items {
                found += usize::from(holds(self, item)?);
            }
            return Ok(found == 1);
        }
        let decides = quantifier == Quantifier::Exists;
        items
            .try_fold(Ok(!decides), |so_far, item| {
                match self.joined(decides, so_far, |run| holds(run, item)) {
                    Ok(value) if value == decides => Err(Ok(decides)),
                    Err(Halt::TooCostly) => Err(Err(Halt::TooCostly)),
                    other => Ok(other),
                }
            })
            .unwrap_or_else(|ended| ended)
    }

    fn equal(&mut self, a: &Val<'a>, b: &Val<'a>) -> Done<bool> {
        self.steps(1)?;
        Ok(match (a, b) {
            (Val::Null, Val::Null) => true,
            (Val::Bool(a), Val::Bool(b)) => a == b,
            (Val::Text(a), Val::Text(b)) => {
                a.len() == b.len() && {
                    self.steps(a.len() / BYTES_A_STEP)?;
                    a == b
                }
            }
            (Val::Int(_) | Val::Double(_), Val::Int(_) | Val::Double(_)) => {
                self.order(a, b)? == Some(Ordering::Equal)
            }
            (Val::Object(a), Val::Object(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (name, value) in *a {
                    let Some(other) = b.get(name) else { return Ok(false) };
                    if !self.equal(&of(value), &of(other))? {
                        return Ok(false);
                    }
                }
                true
            }
            (Val::Headers(a), Val::Headers(b)) => std::ptr::eq(*a, *b),
            _ => match (length(a), length(b)) {
                (Some(long), Some(other)) if long == other => {
                    for at in 0..long {
                        if !self.equal(&item(a, at), &item(b, at))? {
                            return Ok(false);
                        }
                    }
                    true
                }
                _ => false,
            },
        })
    }

    /// `None` where neither is before the other.
    fn order(&mut self, a: &Val<'a>, b: &Val<'a>) -> Done<Option<Ordering>> {
        Ok(match (a, b) {
            (Val::Int(a), Val::Int(b)) => Some(a.cmp(b)),
            (Val::Int(a), Val::Double(b)) => (*a as f64).partial_cmp(b),
            (Val::Double(a), Val::Int(b)) => a.partial_cmp(&(*b as f64)),
            (Val::Double(a), Val::Double(b)) => a.partial_cmp(b),
            (Val::Bool(a), Val::Bool(b)) => Some(a.cmp(b)),
            (Val::Text(a), Val::Text(b)) => {
                self.steps(a.len().min(b.len()) / BYTES_A_STEP)?;
                Some(a.cmp(b))
            }
            _ => return Err(Halt::Failed),
        })
    }

    fn holds(&mut self, of: &Val<'a>, sought: &Val<'a>) -> Done<bool> {
        if let Some(length) = length(of) {
            for at in 0..length {
                if self.equal(&item(of, at), sought)? {
                    return Ok(true);
                }
            }
            return Ok(false);
        }
        match sought {
            Val::Text(name) => Ok(field_of(of, name)?.is_some()),
            _ => Err(Halt::Failed),
        }
    }

    fn arithmetic(&mut self, what: Arithmetic, a: Val<'a>, b: Val<'a>) -> Done<Val<'a>> {
        let (a, b) = match (a, b) {
            (Val::Int(a), Val::Int(b)) => {
                return whole(match what {
                    Arithmetic::Add => a.checked_add(b),
                    Arithmetic::Subtract => a.checked_sub(b),
                    Arithmetic::Multiply => a.checked_mul(b),
                    Arithmetic::Divide => a.checked_div(b),
                    Arithmetic::Modulo => a.checked_rem(b),
                });
            }
            (Val::Text(a), Val::Text(b)) if matches!(what, Arithmetic::Add) => {
                self.steps((a.len() + b.len()) / BYTES_A_STEP)?;
                return Ok(Val::Text(a + b));
            }
            (Val::Double(a), Val::Double(b)) => (a, b),
            // A number in JSON has no type of its own: 10 and 9.99 may be two values of one field.
            (Val::Int(a), Val::Double(b)) => (a as f64, b),
            (Val::Double(a), Val::Int(b)) => (a, b as f64),
            _ => return Err(Halt::Failed),
        };
        Ok(Val::Double(match what {
            Arithmetic::Add => a + b,
            Arithmetic::Subtract => a - b,
            Arithmetic::Multiply => a * b,
            Arithmetic::Divide => a / b,
            Arithmetic::Modulo => return Err(Halt::Failed),
        }))
    }
}

fn of(value: &Value) -> Val<'_> {
    match value {
        Value::Null => Val::Null,
        Value::Bool(value) => Val::Bool(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Val::Int(value.into()),
            (None, Some(value)) => Val::Int(value.into()),
            (None, None) => Val::Double(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Val::Text(Cow::Borrowed(text)),
        Value::Array(items) => Val::Array(items),
        Value::Object(map) => Val::Object(map),
    }
}

/// `Failed`: it has no fields.
fn field_of<'a>(operand: &Val<'a>, field: &str) -> Done<Option<Val<'a>>> {
    match operand {
        Val::Object(map) => Ok(map.get(field).map(of)),
        Val::Headers(headers) => Ok(headers.get(field).map(|value| Val::Text(Cow::Borrowed(value)))),
        _ => Err(Halt::Failed),
    }
}

fn length(list: &Val<'_>) -> Option<usize> {
    match list {
        Val::Array(items) => Some(items.len()),
        Val::List(items) => Some(items.len()),
        _ => None,
    }
}

fn item<'a>(list: &Val<'a>, at: usize) -> Val<'a> {
    match list {
        Val::Array(items) => items.get(at).map_or(Val::Null, of),
        Val::List(items) => items.get(at).cloned().unwrap_or(Val::Null),
        _ => Val::Null,
    }
}

/// A whole number that both i64 and u64 together can hold.
fn whole<'a>(value: Option<i128>) -> Done<Val<'a>> {
    match value {
        Some(value) if (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&value) => Ok(Val::Int(value)),
        _ => Err(Halt::Failed),
    }
}

fn converted<'a>(value: &Val<'a>, to_double: bool) -> Option<Val<'a>> {
    match (value, to_double) {
        (Val::Int(value), true) => Some(Val::Double(*value as f64)),
        (Val::Int(value), false) => Some(Val::Int(*value)),
        (Val::Double(value), true) => Some(Val::Double(*value)),
        (Val::Double(value), false) if value.is_finite() => whole(Some(*value as i128)).ok(),
        (Val::Text(text), true) => text.parse().ok().map(Val::Double),
        (Val::Text(text), false) => text.parse::<i64>().ok().map(|value| Val::Int(value.into())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use serde_json::json;

    use super::*;

    static HEADERS: LazyLock<Headers> =
        LazyLock::new(|| [("kind".to_owned(), "alarm".to_owned()), ("n".to_owned(), "7".to_owned())].into());

    fn verdict(text: &str, payload: &Value) -> (Verdict, usize) {
        let filter = Filter::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        filter.count(Subject { topic: "orders.eu", key: Some("k1"), headers: &HEADERS, payload })
    }

    #[test]
    fn an_expression_means_what_cel_says() {
        let payload = json!({"n": 5, "x": 9.5, "s": "aäb", "big": u64::MAX, "none": null, "list": [1, 2, 3],
            "items": [{"sku": "a", "n": 1}, {"sku": "b"}], "o": {"a": 1, "b": [1]}});
        let table = [
            ("true", Verdict::Matches),
            ("1", Verdict::Failed),
            ("payload.n == 5 && payload.x > 9", Verdict::Matches),
            ("payload.n > payload.x", Verdict::DoesNot),
            ("payload.n * 2 == 10 && payload.x * 2 == 19 && payload.n + payload.x == 14.5", Verdict::Matches),
            ("-payload.n == -5 && 7 / 2 == 3 && 7 % 2 == 1 && 1 - 2 == -1", Verdict::Matches),
            ("payload.big == 18446744073709551615u", Verdict::Matches),
            ("payload.big * payload.big > 0", Verdict::Failed),
            ("1 / 0 == 1", Verdict::Failed),
            ("payload.s == 'aäb' && size(payload.s) == 3 && payload.s.size() == 3", Verdict::Matches),
            ("payload.s + 'c' == \"aäbc\"", Verdict::Matches),
            (
                "payload.s.contains('ä') && payload.s.startsWith('a') && payload.s.endsWith('b')",
                Verdict::Matches,
            ),
            ("payload.s < 'b' && payload.s != 'x'", Verdict::Matches),
            ("topic == 'orders.eu' && key == 'k1'", Verdict::Matches),
            ("headers.kind == 'alarm' && headers['kind'] == 'alarm' && 'kind' in headers", Verdict::Matches),
            ("has(headers.kind) && !has(headers.other) && int(headers.n) > 6", Verdict::Matches),
            ("double('1.5') == 1.5 && int(1.9) == 1 && int('x') == 1", Verdict::Failed),
            ("payload.missing == 1", Verdict::Failed),
            ("payload.missing == 1 || payload.n == 5", Verdict::Matches),
            ("payload.n == 5 || payload.missing == 1", Verdict::Matches),
            ("payload.missing == 1 && payload.n == 6", Verdict::DoesNot),
            ("payload.missing == 1 || payload.n == 6", Verdict::Failed),
            ("has(payload.none) && payload.none == null && !has(payload.missing)", Verdict::Matches),
            ("has(payload.n.deeper)", Verdict::Failed),
            ("payload.n == '5'", Verdict::DoesNot),
            ("payload.n < '6'", Verdict::Failed),
            ("payload.n in [1, 5] && !(payload.n in payload.list) && 'o' in payload", Verdict::Matches),
            ("payload.list == [1, 2, 3] && payload.list[0] == 1 && payload.o == payload.o", Verdict::Matches),
            ("payload.list[3] == 1", Verdict::Failed),
            ("payload.list[-1] == 1", Verdict::Failed),
            ("payload.n > 3 ? payload.x > 9 : payload.missing", Verdict::Matches),
            ("payload.items.exists(i, i.sku == 'b')", Verdict::Matches),
            ("payload.items.exists(i, i.n == 9)", Verdict::Failed),
            ("payload.items.exists(i, i.n == 1)", Verdict::Matches),
            ("payload.items.all(i, has(i.sku)) && !payload.items.all(i, has(i.n))", Verdict::Matches),
            ("payload.list.exists_one(i, i > 2) && !payload.list.exists_one(i, i > 1)", Verdict::Matches),
            ("[].all(i, i > 2) && ![].exists(i, i > 2)", Verdict::Matches),
            ("payload.list.all(a, payload.list.exists(b, a == b))", Verdict::Matches),
            ("payload.exists(name, name == 's')", Verdict::Matches),
            ("payload.n.exists(i, true)", Verdict::Failed),
        ];
        for (text, expected) in table {
            assert_eq!(verdict(text, &payload).0, expected, "{text}");
        }
        // What is not JSON is null.
        assert_eq!(verdict("payload.n == 5", &Value::Null).0, Verdict::Failed);
        assert_eq!(verdict("payload == null || topic == 'a'", &Value::Null).0, Verdict::Matches);
    }

    #[test]
    fn what_is_no_expression_is_refused_at_its_place() {
        let table = [
            ("", 1, 1, ""),
            ("payload.n ==", 1, 13, ""),
            ("payload.n == 1 &&\n  ü == 2", 2, 3, ""),
            ("payload.n = 1", 1, 11, ""),
            ("paylod.n == 1", 1, 1, "`paylod` is not known: there are topic, key, headers and payload"),
            ("true && payload.s.matches('a')", 1, 26, "`matches` is not known with these arguments"),
            ("payload.list.map(i, i) == []", 1, 17, "`map` is not known with these arguments"),
            ("payload.list.exists(i, i) && i", 1, 30, "`i` is not known"),
            ("payload.list.exists(1, true)", 1, 21, "the first argument is the name of a variable"),
            ("has(payload)", 1, 5, "has() takes a field"),
            ("{'a': 1} == payload", 1, 1, "maps are not made here"),
            ("b'a' == payload.s", 1, 1, "bytes are not compared here"),
        ];
        for (text, line, column, why) in table {
            let error = Filter::parse(text).unwrap_err();
            assert_eq!((error.line, error.column), (line, column), "{text}: {error}");
            assert!(error.why.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn no_text_breaks_the_parser() {
        let deep = |open: &str, close: &str, n: usize| open.repeat(n) + "1" + &close.repeat(n);
        let hostile = [
            deep("(", ")", 2000),
            deep("(", ")", 31),
            deep("[", "]", 31),
            deep("size(", ")", 31),
            deep("[", "]", 30) + " == 1",
            deep("true?", ":1", 31),
            deep("-", "", 4000),
            deep("!", "", 4000),
            "1+".repeat(2000) + "1",
            "a.".repeat(2000) + "a",
            "1<".repeat(2000) + "1",
            "true&&".repeat(600) + "true",
            "a[".repeat(1000),
            "(".repeat(31) + &"{".repeat(400),
            ">".to_owned() + &"{".repeat(30) + "?[" + "l\u{0}?(-",
            "'".repeat(4000),
            "/".to_owned(),
            ".".to_owned(),
            "1 +".to_owned(),
            "(".to_owned(),
            ")".to_owned(),
            "\u{0}".repeat(100),
            "ä".repeat(2048),
            "x".repeat(TEXT_BYTES_MAX + 1),
        ];
        for text in hostile {
            // The parser's own stack and bounds hold: this process is still there.
            if let Err(error) = Filter::parse(&text) {
                assert!(!error.why.contains("the parser failed on it"), "{text}: {error}");
            }
        }
    }

    #[test]
    fn an_evaluation_has_a_bound_whatever_the_expression_and_the_payload() {
        let wide = json!({"list": vec![1; 50_000], "text": "x".repeat(500_000)});
        // One macro over a large list stays within it.
        let (found, steps) = verdict("payload.list.exists(i, i > 5)", &wide);
        assert_eq!(found, Verdict::DoesNot);
        assert!(steps < STEPS_MAX / 2, "{steps}");
        let double = "(".repeat(20) + "payload.text" + &")+payload.text".repeat(20) + " == ''";
        for text in [
            "payload.list.all(a, payload.list.all(b, a == b))",
            "payload.list.all(a, payload == payload)",
            "payload.list.all(a, payload.text.contains('xy') || true)",
            "payload.list.all(a, a in payload.list && 2 in payload.list || true)",
            "payload.list.all(a, size(payload.text + payload.text) > 0)",
            &double,
        ] {
            let (found, steps) = verdict(text, &wide);
            assert_eq!((found, steps), (Verdict::TooCostly, STEPS_MAX), "{text}");
        }
    }
}
