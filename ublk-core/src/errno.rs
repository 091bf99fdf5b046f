// SPDX-License-Identifier: MIT OR Apache-2.0

//! Error numbers, as they are passed between the driver, files and handlers.
//!
//! `nix::errno::Errno` is an enum of the names of the C library. It turns numbers that it lacks (41, 58, and all from 134 on)
//! into zero, which is an answer of success. File systems and handlers may use any number up to 4095, so this crate uses
//! [`Errno`], and converts errors of nix where it calls nix. Other files use nix's only by the path of a value, never as a
//! type.

use std::fmt;
use std::io;
use std::num::NonZeroU16;

/// The highest number that the kernel takes for an errno (`MAX_ERRNO`).
const MAX: i32 = 4095;

/// From the kernel's `linux/errno.h`: the same as `EOPNOTSUPP`, but for NFS and drivers.
const ENOTSUPP: i32 = 524;
/// From there too: `ERESTARTSYS` to `ERESTART_RESTARTBLOCK`, a system call that a signal has interrupted. Most
/// operations of io_uring turn them into `EINTR`, `fallocate` does not.
const ERESTARTSYS: i32 = 512;
const ERESTARTNOHAND: i32 = 514;
const ERESTART_RESTARTBLOCK: i32 = 516;

/// An error number of Linux: any from 1 to 4095, with or without a name.
///
/// The names of the C library are constants, which can also be patterns:
///
/// ```
/// use ublk_core::Errno;
///
/// let errno = Errno::new(13).unwrap();
/// assert!(matches!(errno, Errno::EACCES | Errno::EPERM));
/// assert_eq!(errno.to_string(), "EACCES: Permission denied");
/// assert_eq!(Errno::new(0), None);
/// ```
///
/// Errnos are equal if their numbers are. The kernel also has numbers for its own use, such as 512 (`ERESTARTSYS`) and 524
/// (`ENOTSUPP`); to compare by meaning, compare what they are [known](Errno::known) as.
///
/// # Requests
///
/// A request may fail with any errno; its result is the one that this is [known](Errno::known) as. The block layer passes on
/// those for which it has a status: `EOPNOTSUPP`, `ETIMEDOUT`, `ENOSPC`, `ENOLINK`, `EREMOTEIO`, `EBADE`, `ENODATA`, `EILSEQ`,
/// `ENOMEM`, `EBUSY`, `EAGAIN`, `ENODEV`, `EREMCHG`, `ETOOMANYREFS`, `EOVERFLOW`, `ETIME` (since Linux 6.5) and `EINVAL`
/// (since 6.11). Clients get `EIO` for all others.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(NonZeroU16);

impl Errno {
    /// Returns a number as an errno; `None` unless it is from 1 to 4095.
    pub const fn new(number: i32) -> Option<Self> {
        if number < 1 || number > MAX {
            return None;
        }
        match NonZeroU16::new(number as u16) {
            Some(number) => Some(Errno(number)),
            None => None,
        }
    }

    /// A number of the C library.
    const fn named(number: i32) -> Self {
        Self::new(number).expect("the C library's numbers are from 1 to 133")
    }

    /// Splits the result of a system call or completion. A negative number that is no errno is `EIO`.
    pub(crate) fn check(result: i32) -> Result<u32, Self> {
        u32::try_from(result).map_err(|_| result.checked_neg().and_then(Self::new).unwrap_or(Self::EIO))
    }

    /// Returns the number.
    pub const fn get(self) -> i32 {
        self.0.get() as i32
    }

    /// Returns the errno as one with a name: itself if it has one, `EOPNOTSUPP` and `EINTR` for the kernel's own numbers of that
    /// meaning (524; 512 to 514 and 516), and `EIO` for any other.
    pub const fn known(self) -> Self {
        match self.get() {
            ENOTSUPP => Errno::EOPNOTSUPP,
            ERESTARTSYS..=ERESTARTNOHAND | ERESTART_RESTARTBLOCK => Errno::EINTR,
            _ if self.entry().is_some() => self,
            _ => Errno::EIO,
        }
    }

    /// Returns the name, such as `"EIO"`; `None` if the number has none.
    pub const fn name(self) -> Option<&'static str> {
        match self.entry() {
            Some((name, _)) => Some(name),
            None => None,
        }
    }

    /// Returns what the errno means, such as `"I/O error"`; `"Unknown errno"` if the number has no name.
    pub const fn desc(self) -> &'static str {
        match self.entry() {
            Some((_, text)) => text,
            None => "Unknown errno",
        }
    }
}

macro_rules! errnos {
    ($($name:ident: $text:literal,)+) => {
        /// The names of the C library.
        impl Errno {
            $(
                #[doc = concat!($text, ".")]
                pub const $name: Errno = Errno::named(libc::$name);
            )+

            /// The name and what it means.
            const fn entry(self) -> Option<(&'static str, &'static str)> {
                match self {
                    $(Errno::$name => Some((stringify!($name), $text)),)+
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM: "Operation not permitted",
    ENOENT: "No such file or directory",
    ESRCH: "No such process",
    EINTR: "Interrupted system call",
    EIO: "I/O error",
    ENXIO: "No such device or address",
    E2BIG: "Argument list too long",
    ENOEXEC: "Exec format error",
    EBADF: "Bad file number",
    ECHILD: "No child processes",
    EAGAIN: "Try again",
    ENOMEM: "Out of memory",
    EACCES: "Permission denied",
    EFAULT: "Bad address",
    ENOTBLK: "Block device required",
    EBUSY: "Device or resource busy",
    EEXIST: "File exists",
    EXDEV: "Cross-device link",
    ENODEV: "No such device",
    ENOTDIR: "Not a directory",
    EISDIR: "Is a directory",
    EINVAL: "Invalid argument",
    ENFILE: "File table overflow",
    EMFILE: "Too many open files",
    ENOTTY: "Not a typewriter",
    ETXTBSY: "Text file busy",
    EFBIG: "File too large",
    ENOSPC: "No space left on device",
    ESPIPE: "Illegal seek",
    EROFS: "Read-only file system",
    EMLINK: "Too many links",
    EPIPE: "Broken pipe",
    EDOM: "Math argument out of domain of func",
    ERANGE: "Math result not representable",
    EDEADLK: "Resource deadlock would occur",
    ENAMETOOLONG: "File name too long",
    ENOLCK: "No record locks available",
    ENOSYS: "Function not implemented",
    ENOTEMPTY: "Directory not empty",
    ELOOP: "Too many symbolic links encountered",
    ENOMSG: "No message of desired type",
    EIDRM: "Identifier removed",
    ECHRNG: "Channel number out of range",
    EL2NSYNC: "Level 2 not synchronized",
    EL3HLT: "Level 3 halted",
    EL3RST: "Level 3 reset",
    ELNRNG: "Link number out of range",
    EUNATCH: "Protocol driver not attached",
    ENOCSI: "No CSI structure available",
    EL2HLT: "Level 2 halted",
    EBADE: "Invalid exchange",
    EBADR: "Invalid request descriptor",
    EXFULL: "Exchange full",
    ENOANO: "No anode",
    EBADRQC: "Invalid request code",
    EBADSLT: "Invalid slot",
    EBFONT: "Bad font file format",
    ENOSTR: "Device not a stream",
    ENODATA: "No data available",
    ETIME: "Timer expired",
    ENOSR: "Out of streams resources",
    ENONET: "Machine is not on the network",
    ENOPKG: "Package not installed",
    EREMOTE: "Object is remote",
    ENOLINK: "Link has been severed",
    EADV: "Advertise error",
    ESRMNT: "Srmount error",
    ECOMM: "Communication error on send",
    EPROTO: "Protocol error",
    EMULTIHOP: "Multihop attempted",
    EDOTDOT: "RFS specific error",
    EBADMSG: "Not a data message",
    EOVERFLOW: "Value too large for defined data type",
    ENOTUNIQ: "Name not unique on network",
    EBADFD: "File descriptor in bad state",
    EREMCHG: "Remote address changed",
    ELIBACC: "Can not access a needed shared library",
    ELIBBAD: "Accessing a corrupted shared library",
    ELIBSCN: ".lib section in a.out corrupted",
    ELIBMAX: "Attempting to link in too many shared libraries",
    ELIBEXEC: "Cannot exec a shared library directly",
    EILSEQ: "Illegal byte sequence",
    ERESTART: "Interrupted system call should be restarted",
    ESTRPIPE: "Streams pipe error",
    EUSERS: "Too many users",
    ENOTSOCK: "Socket operation on non-socket",
    EDESTADDRREQ: "Destination address required",
    EMSGSIZE: "Message too long",
    EPROTOTYPE: "Protocol wrong type for socket",
    ENOPROTOOPT: "Protocol not available",
    EPROTONOSUPPORT: "Protocol not supported",
    ESOCKTNOSUPPORT: "Socket type not supported",
    EOPNOTSUPP: "Operation not supported on transport endpoint",
    EPFNOSUPPORT: "Protocol family not supported",
    EAFNOSUPPORT: "Address family not supported by protocol",
    EADDRINUSE: "Address already in use",
    EADDRNOTAVAIL: "Cannot assign requested address",
    ENETDOWN: "Network is down",
    ENETUNREACH: "Network is unreachable",
    ENETRESET: "Network dropped connection because of reset",
    ECONNABORTED: "Software caused connection abort",
    ECONNRESET: "Connection reset by peer",
    ENOBUFS: "No buffer space available",
    EISCONN: "Transport endpoint is already connected",
    ENOTCONN: "Transport endpoint is not connected",
    ESHUTDOWN: "Cannot send after transport endpoint shutdown",
    ETOOMANYREFS: "Too many references: cannot splice",
    ETIMEDOUT: "Connection timed out",
    ECONNREFUSED: "Connection refused",
    EHOSTDOWN: "Host is down",
    EHOSTUNREACH: "No route to host",
    EALREADY: "Operation already in progress",
    EINPROGRESS: "Operation now in progress",
    ESTALE: "Stale file handle",
    EUCLEAN: "Structure needs cleaning",
    ENOTNAM: "Not a XENIX named type file",
    ENAVAIL: "No XENIX semaphores available",
    EISNAM: "Is a named type file",
    EREMOTEIO: "Remote I/O error",
    EDQUOT: "Quota exceeded",
    ENOMEDIUM: "No medium found",
    EMEDIUMTYPE: "Wrong medium type",
    ECANCELED: "Operation canceled",
    ENOKEY: "Required key not available",
    EKEYEXPIRED: "Key has expired",
    EKEYREVOKED: "Key has been revoked",
    EKEYREJECTED: "Key was rejected by service",
    EOWNERDEAD: "Owner died",
    ENOTRECOVERABLE: "State not recoverable",
    ERFKILL: "Operation not possible due to RF-kill",
    EHWPOISON: "Memory page has hardware error",
}

/// Other names of the C library for the same numbers.
impl Errno {
    /// Another name of `EAGAIN`.
    pub const EWOULDBLOCK: Errno = Errno::named(libc::EWOULDBLOCK);
    /// Another name of `EDEADLK`.
    pub const EDEADLOCK: Errno = Errno::named(libc::EDEADLOCK);
    /// Another name of `EOPNOTSUPP`.
    pub const ENOTSUP: Errno = Errno::named(libc::ENOTSUP);
}

/// For this crate's calls of nix, and hidden because it is not part of the API: it would tie that to a version of nix.
/// `UnknownErrno`, where the number is lost, becomes `EIO`.
#[doc(hidden)]
impl From<nix::errno::Errno> for Errno {
    fn from(errno: nix::errno::Errno) -> Self {
        Self::new(errno as i32).unwrap_or(Self::EIO)
    }
}

/// The error's number; without one, that of its kind for those that the block layer distinguishes, and `EIO` for others.
impl From<&io::Error> for Errno {
    fn from(error: &io::Error) -> Self {
        error.raw_os_error().and_then(Self::new).unwrap_or_else(|| match error.kind() {
            io::ErrorKind::OutOfMemory => Self::ENOMEM,
            io::ErrorKind::StorageFull => Self::ENOSPC,
            io::ErrorKind::TimedOut => Self::ETIMEDOUT,
            io::ErrorKind::Unsupported => Self::EOPNOTSUPP,
            _ => Self::EIO,
        })
    }
}

/// An error with the same number.
impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        io::Error::from_raw_os_error(errno.get())
    }
}

impl std::error::Error for Errno {}

/// Name and meaning, as in `ENOSPC: No space left on device`; `errno 503` if the number has no name.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry() {
            Some((name, text)) => write!(f, "{name}: {text}"),
            None => write!(f, "errno {}", self.0),
        }
    }
}

/// The name, as in `ENOSPC`; `Errno(503)` if the number has none.
impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = Errno> {
        (1..=MAX).map(|number| Errno::new(number).unwrap())
    }

    #[test]
    fn every_errno_is_known_as_one_that_is_not_success() {
        for (number, errno) in (1..).zip(all()) {
            assert_eq!(errno.get(), number);
            assert!((1..=libc::EHWPOISON).contains(&errno.known().get()), "{number}: {:?}", errno.known());
            assert_eq!(errno.known().known(), errno.known());
        }
        assert_eq!([0, -5, 4096, i32::MAX, i32::MIN].map(Errno::new), [None; 5]);
    }

    /// Messages of programs and of this crate contain them.
    #[test]
    fn names_and_meanings_are_those_of_nix() {
        for errno in all() {
            let nix = nix::errno::Errno::from_raw(errno.get());
            if nix == nix::errno::Errno::UnknownErrno {
                assert_eq!((errno.name(), errno.desc()), (None, nix.desc()), "{errno}");
                assert_eq!(format!("{errno} {errno:?}"), format!("errno {0} Errno({0})", errno.get()));
            } else {
                assert_eq!((errno.name(), errno.desc()), (Some(&*format!("{nix:?}")), nix.desc()));
                assert_eq!(format!("{errno} {errno:?}"), format!("{nix} {nix:?}"));
                assert_eq!((Errno::from(nix), errno.known()), (errno, errno));
            }
        }
        assert_eq!(all().filter(|errno| errno.name().is_some()).count(), 131);
    }

    /// Finds uses of nix's type other than the path of a value, in patterns and calls: all those that could make it a part of
    /// the API.
    fn names_the_type_of_nix(source: &str) -> bool {
        let is_type = |(at, name): (usize, &str)| !source[at + name.len()..].starts_with("::Errno::");
        source.match_indices("nix::errno").any(is_type)
            || ["nix::{", "nix::Result", "nix::Error"].iter().any(|name| source.contains(name))
    }

    #[test]
    fn the_type_of_nix_is_not_part_of_the_api() {
        for planted in [
            "use nix::errno::Errno;",
            "pub use nix::errno;",
            "use nix::{errno::Errno, unistd::Pid};",
            "pub fn read() -> nix::Result<()> {",
            "    errno: nix::errno::Errno,",
        ] {
            assert!(names_the_type_of_nix(planted), "{planted}");
        }
        assert!(!names_the_type_of_nix("Err(nix::errno::Errno::EINTR) => {}"));

        let mut directories = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if !path.ends_with("src/errno.rs") {
                    let source = std::fs::read_to_string(&path).unwrap();
                    assert!(!names_the_type_of_nix(&source), "{}: use crate::Errno", path.display());
                }
            }
        }
    }

    #[test]
    fn errors_of_the_kernel_alone_keep_their_meaning() {
        let known = |number| Errno::new(number).unwrap().known();
        assert_eq!([512, 513, 514, 516].map(known), [Errno::EINTR; 4]);
        assert_eq!([524, 28].map(known), [Errno::EOPNOTSUPP, Errno::ENOSPC]);
        assert_eq!([41, 58, 134, 503, 511, 515, 517, 528, 600].map(known), [Errno::EIO; 9]);
    }

    #[test]
    fn errnos_are_equal_by_number_only() {
        assert_ne!(Errno::new(524), Some(Errno::EOPNOTSUPP));
        assert_ne!(Errno::new(512), Some(Errno::EINTR));
        assert_eq!([Errno::EWOULDBLOCK, Errno::ENOTSUP], [Errno::EAGAIN, Errno::EOPNOTSUPP]);
        assert!(matches!(Errno::new(35), Some(Errno::EDEADLOCK)));
    }

    #[test]
    fn a_negative_result_is_an_error_whatever_its_number() {
        assert_eq!(Errno::check(7), Ok(7));
        assert_eq!(Errno::check(-503).unwrap_err().get(), 503);
        assert_eq!([-4096, i32::MIN].map(Errno::check), [Err(Errno::EIO); 2]);
    }

    #[test]
    fn an_errno_that_was_lost_is_not_success() {
        assert_eq!(Errno::from(nix::errno::Errno::from_raw(503)), Errno::EIO);
        assert_eq!(Errno::from(&io::Error::from_raw_os_error(0)), Errno::EIO);
        assert_eq!(Errno::from(&io::Error::other("no number")), Errno::EIO);
        assert_eq!(Errno::from(&io::ErrorKind::InvalidData.into()), Errno::EIO);
    }

    #[test]
    fn a_kind_of_error_has_an_errno() {
        assert_eq!(Errno::from(&io::ErrorKind::StorageFull.into()), Errno::ENOSPC);
        assert_eq!(Errno::from(&io::ErrorKind::Unsupported.into()), Errno::EOPNOTSUPP);
    }

    #[test]
    fn an_io_error_keeps_any_number() {
        for errno in all() {
            assert_eq!(Errno::from(&io::Error::from(errno)), errno);
        }
    }
}
