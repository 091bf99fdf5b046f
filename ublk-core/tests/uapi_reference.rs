// SPDX-License-Identifier: MIT OR Apache-2.0

//! `kmod/include/uapi/linux/ublk_cmd.h` says the same as Linux's own header.
//!
//! Both headers are read by machine: the preprocessor lists their macros, bindgen their structures,
//! and C programs compiled against each print every value, size and offset. What is printed must
//! agree, and a name that only one side has is a difference too.
//!
//! The reference is the directory in `UBLK_REFERENCE_INCLUDE` (it holds `linux/ublk_cmd.h`), or what
//! `vm/package linux-libc-dev` fetches: the newest that Debian offers.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names that are ours alone, and why.
const ONLY_OURS: [(&str, &str); 0] = [];

/// Constants of another width in C than Linux's, and why. Their values agree.
const OTHER_WIDTH: [(&str, &str); 1] =
    [("UBLK_IO_F_INTEGRITY", "Linux makes this one an unsigned long; like its neighbours it is ANDed with a __u32")];

/// What has to be found in a header for a comparison to mean anything.
const LEAST_CONSTANTS: usize = 125;
const LEAST_STRUCTS: usize = 16;
const LEAST_FIELDS: usize = 95;
const LEAST_FUNCTIONS: usize = 7;

/// Calls every inline function of the header on a range of inputs.
const FUNCTIONS_PROBE: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <linux/ublk_cmd.h>

static void probe(unsigned long long x)
{
	struct ublksrv_io_desc iod = { .op_flags = (__u32)x };
	struct ublk_auto_buf_reg reg = ublk_sqe_addr_to_auto_buf_reg(x);
	struct ublk_auto_buf_reg in = {
		.index = (__u16)(x * 3), .flags = (__u8)(x >> 11),
		.reserved0 = (__u8)(x >> 7), .reserved1 = (__u32)(x * 5),
	};

	printf("%llx op %x flags %x", x, ublksrv_get_op(&iod), ublksrv_get_flags(&iod));
	printf(" reg %x %x %x %x", reg.index, reg.flags, reg.reserved0, reg.reserved1);
	printf(" sqe %llx", (unsigned long long)ublk_auto_buf_reg_to_sqe_addr(&in));
	printf(" shmem %llx %x %x\n",
	       (unsigned long long)ublk_shmem_zc_addr((__u16)(x >> 9), (__u32)(x * 7)),
	       ublk_shmem_zc_index(x), ublk_shmem_zc_offset(x));
}

int main(void)
{
	unsigned long long x = 88172645463325252ULL;
	int i;

	probe(0);
	for (i = 0; i < 64; i++) {
		probe(1ULL << i);
		probe((1ULL << i) - 1);
		probe(~(1ULL << i));
	}
	for (i = 0; i < 1000; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		probe(x);
	}
	return 0;
}
"#;

/// One of the two headers, with what the compiler needs to find it and what it includes.
struct Side {
    name: &'static str,
    header: PathBuf,
    includes: Vec<PathBuf>,
}

struct Field {
    name: String,
    kind: String,
}

/// The directory of this package: where cargo runs the test, not where the test was built.
fn package() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this").into()
}

fn repository() -> PathBuf {
    package().join("..")
}

/// The directory of the reference header; found once for all tests.
fn reference_include() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| match env::var_os("UBLK_REFERENCE_INCLUDE") {
        Some(directory) => {
            let directory = PathBuf::from(directory);
            assert!(
                directory.join("linux/ublk_cmd.h").is_file(),
                "UBLK_REFERENCE_INCLUDE={} holds no linux/ublk_cmd.h",
                directory.display()
            );
            directory
        }
        None => fetch_reference(),
    })
}

fn fetch_reference() -> PathBuf {
    let program = repository().join("vm/package");
    let output = Command::new(&program).arg("linux-libc-dev").output().unwrap_or_else(|err| {
        panic!(
            "no reference header: cannot run {}: {err} (UBLK_REFERENCE_INCLUDE names a directory \
             that holds linux/ublk_cmd.h instead)",
            program.display()
        )
    });
    assert!(
        output.status.success(),
        "no reference header: {} linux-libc-dev: {}\n{}",
        program.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let printed = String::from_utf8(output.stdout).expect("vm/package printed no UTF-8");
    let package = PathBuf::from(printed.trim());
    let include = package.join("usr/include");
    assert!(
        include.join("linux/ublk_cmd.h").is_file(),
        "the package that vm/package linux-libc-dev left in {} holds no usr/include/linux/ublk_cmd.h",
        package.display()
    );
    include
}

/// The directories with `<asm/types.h>` and the like, which Debian keeps apart per architecture.
fn asm_include() -> PathBuf {
    let triple = run(Command::new("cc").arg("-dumpmachine"));
    let triple = triple.trim();
    let own = reference_include().join(triple);
    if own.join("asm/types.h").is_file() { own } else { Path::new("/usr/include").join(triple) }
}

fn reference() -> Side {
    let include = reference_include();
    Side {
        name: "Linux's header",
        header: include.join("linux/ublk_cmd.h"),
        includes: vec![include.to_owned(), asm_include()],
    }
}

/// Our header, on top of the reference's `<linux/types.h>` so that nothing else differs.
fn ours() -> Side {
    let include = repository().join("kmod/include/uapi");
    Side {
        name: "our header",
        header: include.join("linux/ublk_cmd.h"),
        includes: vec![include, reference_include().to_owned(), asm_include()],
    }
}

impl Side {
    /// `-I` first for the directory of the header itself: it must win over the system's.
    fn flags(&self) -> Vec<OsString> {
        self.includes.iter().flat_map(|path| [OsString::from("-I"), path.clone().into_os_string()]).collect()
    }

    /// The header's own lines after preprocessing, its `#define`s kept and its comments gone.
    fn preprocessed(&self) -> String {
        let text = run(Command::new("cc").args(self.flags()).args(["-E", "-dD", "-x", "c"]).arg(&self.header));
        let header = self.header.canonicalize().unwrap();
        let mut inside = false;
        let mut own = String::new();
        for line in text.lines() {
            if let Some(marker) = line.strip_prefix("# ") {
                let file = marker.split('"').nth(1).unwrap_or_default();
                inside = Path::new(file).canonicalize().is_ok_and(|path| path == header);
            } else if inside {
                own.push_str(line);
                own.push('\n');
            }
        }
        assert!(!own.is_empty(), "the preprocessor showed nothing of {}", self.header.display());
        own
    }

    /// Names of the macros with a value (true) and of the empty ones (false).
    fn macros(&self) -> BTreeMap<String, bool> {
        self.preprocessed()
            .lines()
            .filter_map(|line| line.strip_prefix("#define "))
            .map(|define| match define.split_once(char::is_whitespace) {
                Some((name, value)) => (name.to_owned(), !value.trim().is_empty()),
                None => (define.to_owned(), false),
            })
            .inspect(|(name, _)| {
                assert!(!name.contains('('), "{}: {name} takes arguments: not compared", self.name);
            })
            .collect()
    }

    /// The inline functions: name -> signature without the names of parameters.
    fn functions(&self) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let mut depth = 0_usize;
        let mut head = String::new();
        let text = self.preprocessed();
        let code = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join(" ");
        for c in code.chars() {
            match c {
                '{' => {
                    if depth == 0 && head.trim_end().ends_with(')') {
                        let (name, signature) = signature(&head);
                        found.insert(name, signature);
                    }
                    depth += 1;
                }
                '}' => depth = depth.checked_sub(1).expect("unbalanced braces in a header"),
                _ if depth > 0 => continue,
                _ => {}
            }
            match c {
                '{' | '}' | ';' => head.clear(),
                _ => head.push(c),
            }
        }
        found
    }

    /// The structures: name -> fields in order, those of unnamed unions among them.
    fn structs(&self) -> BTreeMap<String, Vec<Field>> {
        let file = self.bindgen(&[]);
        let mut fields = BTreeMap::new();
        let mut unions = BTreeMap::new();
        for item in file.items {
            match item {
                syn::Item::Struct(item) => fields.insert(item.ident.to_string(), list(&item.fields)),
                syn::Item::Union(item) => unions.insert(item.ident.to_string(), list(&syn::Fields::Named(item.fields))),
                _ => None,
            };
        }
        for list in fields.values_mut() {
            *list = std::mem::take(list)
                .into_iter()
                .flat_map(|field| unions.remove(&field.kind).unwrap_or_else(|| vec![field]))
                .collect();
        }
        assert!(unions.is_empty(), "{}: unions not compared: {:?}", self.name, unions.keys());
        fields
    }

    /// Sizes, alignments and offsets on another machine, as bindgen states them.
    fn layout_on(&self, target: &str) -> BTreeMap<String, String> {
        let file = self.bindgen(&[&format!("--target={target}")]);
        let mut layout = BTreeMap::new();
        for item in &file.items {
            let syn::Item::Const(syn::ItemConst { expr, .. }) = item else {
                continue;
            };
            let syn::Expr::Block(block) = expr.as_ref() else {
                continue;
            };
            for statement in &block.block.stmts {
                let (what, value) =
                    assertion(statement).unwrap_or_else(|| panic!("a layout test of bindgen's in an unknown form"));
                layout.insert(what, value);
            }
        }
        layout
    }

    fn bindgen(&self, arguments: &[&str]) -> syn::File {
        assert!(
            panic::catch_unwind(bindgen::clang_version).is_ok(),
            "bindgen found no libclang: install it (Debian: libclang-dev) or set LIBCLANG_PATH to \
             the directory that holds libclang.so"
        );
        let flags = self.flags();
        let bindings = bindgen::Builder::default()
            .header_contents("both.h", "#include <linux/ublk_cmd.h>\n")
            .clang_args(flags.iter().map(|flag| flag.to_str().expect("a path is not UTF-8")))
            .clang_args(arguments)
            .allowlist_file(r".*/linux/ublk_cmd\.h")
            .generate_comments(false)
            .formatter(bindgen::Formatter::None)
            .generate()
            .unwrap_or_else(|err| panic!("bindgen cannot read {}: {err}", self.header.display()));
        syn::parse_file(&bindings.to_string()).expect("bindgen wrote something that is not Rust")
    }

    /// Compiles a C program against the header and returns what it prints.
    fn run_c(&self, source: &str) -> String {
        let directory = tempfile::tempdir().expect("no temporary directory");
        let file = directory.path().join("probe.c");
        let program = directory.path().join("probe");
        fs::write(&file, source).expect("cannot write a temporary file");
        run(Command::new("cc").args(self.flags()).arg("-o").arg(&program).arg(&file));
        run(&mut Command::new(&program))
    }

    /// Every constant as a C compiler sees it: name -> (value, bytes).
    fn constants(&self) -> BTreeMap<String, (i128, usize)> {
        let mut body = String::new();
        for (name, _) in self.macros().into_iter().filter(|(_, has_value)| *has_value) {
            writeln!(
                body,
                "printf(\"{name} %s%llu %zu\\n\", ({name}) < 0 ? \"-\" : \"\", \
                 ({name}) < 0 ? -(unsigned long long)({name}) : (unsigned long long)({name}), \
                 sizeof({name}));"
            )
            .unwrap();
        }
        self.run_c(&main_program(&body))
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                (words[0].to_owned(), (words[1].parse().unwrap(), words[2].parse().unwrap()))
            })
            .collect()
    }

    /// Size and alignment of every structure, offset and size of every field.
    fn layout(&self) -> BTreeMap<String, String> {
        let mut body = String::new();
        for (name, fields) in self.structs() {
            writeln!(
                body,
                "printf(\"struct {name}: size %zu, alignment %zu\\n\", \
                 sizeof(struct {name}), _Alignof(struct {name}));"
            )
            .unwrap();
            for Field { name: field, .. } in fields {
                writeln!(
                    body,
                    "printf(\"{name}.{field}: offset %zu, size %zu\\n\", \
                     offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field}));"
                )
                .unwrap();
            }
        }
        self.run_c(&main_program(&body))
            .lines()
            .map(|line| {
                let (what, value) = line.split_once(": ").expect("the probe printed nonsense");
                (what.to_owned(), value.to_owned())
            })
            .collect()
    }
}

fn main_program(body: &str) -> String {
    format!(
        "#include <errno.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n\
         #include <linux/ublk_cmd.h>\nint main(void)\n{{\n{body}return 0;\n}}\n"
    )
}

/// Runs a program and returns what it prints; anything but success is a failure of the test.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|err| {
        let program = command.get_program().display();
        panic!("cannot run {program}: {err} (Debian: gcc and libc6-dev for cc, g++ for c++)")
    });
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("a program printed something that is not UTF-8")
}

/// `static inline T name(A a, B *b)` -> (`name`, `T (A, B *)`)
fn signature(head: &str) -> (String, String) {
    let (before, parameters) = head.trim().split_once('(').expect("a function without parentheses");
    let words: Vec<&str> = before
        .split_whitespace()
        .filter(|word| !["static", "inline", "__inline__", "__inline"].contains(word))
        .collect();
    let (name, result) = words.split_last().expect("a function without a name");
    let parameters: Vec<String> = parameters
        .trim_end()
        .trim_end_matches(')')
        .split(',')
        .map(|parameter| {
            let kind = parameter.trim().trim_end_matches(|c: char| c == '_' || c.is_alphanumeric());
            kind.split_whitespace().collect::<Vec<_>>().join(" ")
        })
        .collect();
    ((*name).to_owned(), format!("{} ({})", result.join(" "), parameters.join(", ")))
}

fn list(fields: &syn::Fields) -> Vec<Field> {
    fields
        .iter()
        .map(|field| Field {
            name: field.ident.as_ref().expect("a field without a name").to_string(),
            kind: kind(&field.ty),
        })
        .collect()
}

fn kind(ty: &syn::Type) -> String {
    match ty {
        syn::Type::Path(path) => path.path.segments.last().unwrap().ident.to_string(),
        syn::Type::Array(array) => {
            format!("{}[{}]", kind(&array.elem), integer(&array.len).expect("an array's length"))
        }
        _ => panic!("a field of a type that is neither a name nor an array"),
    }
}

fn integer(expr: &syn::Expr) -> Option<i128> {
    match expr {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Int(value), .. }) => value.base10_parse().ok(),
        syn::Expr::Unary(syn::ExprUnary { op: syn::UnOp::Neg(_), expr, .. }) => integer(expr).map(|value| -value),
        _ => None,
    }
}

/// `["Size of x"][size_of::<x>() - 32usize];` -> (`Size of x`, `32`)
fn assertion(statement: &syn::Stmt) -> Option<(String, String)> {
    let syn::Stmt::Expr(syn::Expr::Index(index), _) = statement else {
        return None;
    };
    let syn::Expr::Array(array) = index.expr.as_ref() else {
        return None;
    };
    let syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(what), .. }) = array.elems.first()? else {
        return None;
    };
    let syn::Expr::Binary(difference) = index.index.as_ref() else {
        return None;
    };
    Some((what.value(), integer(&difference.right)?.to_string()))
}

/// Compares two maps both ways and describes what differs.
fn differences<T: PartialEq + std::fmt::Debug>(ours: &BTreeMap<String, T>, reference: &BTreeMap<String, T>) -> String {
    let mut text = String::new();
    let names: BTreeSet<&String> = ours.keys().chain(reference.keys()).collect();
    for name in names {
        match (ours.get(name), reference.get(name)) {
            (Some(_), None) if ONLY_OURS.iter().any(|(allowed, _)| allowed == name) => {}
            (Some(value), None) => writeln!(text, "{name}: only ours has it ({value:?})").unwrap(),
            (None, Some(value)) => writeln!(text, "{name}: ours lacks it ({value:?})").unwrap(),
            (Some(our), Some(their)) if our != their => {
                writeln!(text, "{name}: ours {our:?}, Linux {their:?}").unwrap();
            }
            _ => {}
        }
    }
    text
}

fn assert_same<T: PartialEq + std::fmt::Debug>(
    ours: &BTreeMap<String, T>,
    reference: &BTreeMap<String, T>,
    least: usize,
) {
    assert!(
        ours.len() >= least && reference.len() >= least,
        "too little found to compare: {} of ours, {} of Linux {}, expected at least {least}",
        ours.len(),
        reference.len(),
        reference_version()
    );
    let text = differences(ours, reference);
    assert!(text.is_empty(), "different from Linux {}:\n{text}", reference_version());
}

/// The kernel that the reference belongs to, for messages.
fn reference_version() -> String {
    let text = fs::read_to_string(reference_include().join("linux/version.h")).unwrap_or_default();
    let number = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix("#define ")?.strip_prefix(name)?.trim().parse().ok())
    };
    match number("LINUX_VERSION_CODE") {
        Some(code) => {
            let code: u32 = code;
            format!("{}.{}.{}", code >> 16, code >> 8 & 0xff, code & 0xff)
        }
        None => String::from("(unknown version)"),
    }
}

#[test]
fn macros_have_the_same_names() {
    assert_same(&ours().macros(), &reference().macros(), LEAST_CONSTANTS);
}

#[test]
fn constants_have_the_same_values() {
    let mut ours = ours().constants();
    let mut reference = reference().constants();
    for (name, why) in OTHER_WIDTH {
        let our = ours.get_mut(name).unwrap_or_else(|| panic!("our header lacks {name}"));
        let their = reference.get_mut(name).unwrap_or_else(|| panic!("Linux lacks {name}"));
        assert_ne!(our.1, their.1, "{name} has Linux's width; take it off the list ({why})");
        our.1 = their.1;
    }
    assert_same(&ours, &reference, LEAST_CONSTANTS);
}

#[test]
fn structures_have_the_same_fields_and_types() {
    let (ours, reference) = (ours().structs(), reference().structs());
    assert!(ours.len() >= LEAST_STRUCTS, "only {} structures in our header", ours.len());
    assert!(reference.len() >= LEAST_STRUCTS, "only {} structures in Linux's", reference.len());
    assert_same(&by_field(ours), &by_field(reference), LEAST_FIELDS);
}

/// One entry for each field, under its place in its structure.
fn by_field(structs: BTreeMap<String, Vec<Field>>) -> BTreeMap<String, String> {
    structs
        .into_iter()
        .flat_map(|(name, fields)| {
            fields.into_iter().enumerate().map(move |(index, field)| {
                (format!("{name}, field {index:02}"), format!("{} {}", field.kind, field.name))
            })
        })
        .collect()
}

#[test]
fn structures_have_the_same_layout() {
    assert_same(&ours().layout(), &reference().layout(), LEAST_STRUCTS + LEAST_FIELDS);
}

/// 64-bit integers are aligned to four bytes there, so padding differs from this machine's.
#[test]
fn structures_have_the_same_layout_on_32_bit_x86() {
    let target = "i686-unknown-linux-gnu";
    let (ours, reference) = (ours().layout_on(target), reference().layout_on(target));
    assert_eq!(ours.get("Alignment of ublk_params").map(String::as_str), Some("4"));
    assert_same(&ours, &reference, LEAST_STRUCTS * 2 + LEAST_FIELDS);
}

#[test]
fn inline_functions_have_the_same_signatures() {
    assert_same(&ours().functions(), &reference().functions(), LEAST_FUNCTIONS);
}

#[test]
fn inline_functions_return_the_same() {
    for name in reference().functions().keys() {
        assert!(FUNCTIONS_PROBE.contains(&format!("{name}(")), "{name}() is not tried");
    }
    let by_line = |text: String| -> BTreeMap<String, String> {
        text.lines()
            .map(|line| line.split_once(' ').expect("the probe printed nonsense"))
            .map(|(input, results)| (input.to_owned(), results.to_owned()))
            .collect()
    };
    let ours = by_line(ours().run_c(FUNCTIONS_PROBE));
    let reference = by_line(reference().run_c(FUNCTIONS_PROBE));
    assert_same(&ours, &reference, 1100);
    let results: BTreeSet<&String> = ours.values().collect();
    assert!(results.len() > 1000, "only {} different results", results.len());
}

/// bindgen evaluates macros itself; a C compiler must come to the same values.
#[test]
fn the_bindings_have_the_values_that_c_sees() {
    let path = package().join("src/uapi/bindings.rs");
    let text = fs::read_to_string(&path).expect("cannot read bindings.rs");
    let bindings: BTreeMap<String, i128> = syn::parse_file(&text)
        .expect("bindings.rs is not Rust")
        .items
        .iter()
        .filter_map(|item| match item {
            syn::Item::Const(item) if item.ident != "_" => {
                let name = item.ident.to_string();
                let value = integer(&item.expr).unwrap_or_else(|| panic!("{name}: not a number"));
                Some((name, value))
            }
            _ => None,
        })
        .collect();
    let header: BTreeMap<String, i128> =
        ours().constants().into_iter().map(|(name, (value, _))| (name, value)).collect();
    assert!(header.len() >= LEAST_CONSTANTS, "only {} constants in the header", header.len());
    let mut wrong = String::new();
    for name in header.keys().chain(bindings.keys()).collect::<BTreeSet<_>>() {
        let (c, rust) = (header.get(name), bindings.get(name));
        if c != rust {
            writeln!(wrong, "{name}: C {c:?}, bindings {rust:?}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "bindings.rs does not match ublk_cmd.h:\n{wrong}");
}

#[test]
fn the_header_compiles_alone_and_without_warnings() {
    let include = repository().join("kmod/include/uapi");
    let compile = |program: &str, language: &str, standard: &str, extra: &[&str]| {
        run(Command::new(program)
            .args(["-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsyntax-only"])
            .args(["-x", language, standard])
            .args(extra)
            .args([OsStr::new("-I"), include.as_os_str()])
            .args(["-include", "linux/ublk_cmd.h", "/dev/null"]));
    };
    // Unnamed unions are newer than C99: no -pedantic there.
    compile("cc", "c", "-std=gnu89", &[]);
    compile("cc", "c", "-std=c99", &[]);
    compile("cc", "c", "-std=c11", &["-pedantic"]);
    compile("cc", "c", "-std=gnu17", &["-pedantic"]);
    compile("c++", "c++", "-std=c++11", &["-pedantic"]);
    compile("c++", "c++", "-std=c++20", &["-pedantic"]);
}
