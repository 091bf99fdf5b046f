// SPDX-License-Identifier: MIT OR Apache-2.0

//! Error numbers as they are, between the driver, files and handlers.
//!
//! [`Errno`] is the C library's list. What it lacks (41, 58, and all from 134 on) it turns into a zero, and a zero
//! is an answer of success. File systems and handlers may use any number up to 4095, so whatever becomes the
//! answer to a request, or comes out of a completion, is a [`RawErrno`].

use std::fmt;
use std::io;
use std::num::NonZeroU16;

use nix::errno::Errno;

/// The highest number that the kernel takes for an errno (`MAX_ERRNO`).
const MAX: u16 = 4095;
/// The highest number that is known outside the kernel (`EHWPOISON`).
const LAST_PUBLIC: u16 = 133;

/// From the kernel's `linux/errno.h`: the same as `EOPNOTSUPP`, but for NFS and drivers.
const ENOTSUPP: u16 = 524;
/// From there too: `ERESTARTSYS` to `ERESTART_RESTARTBLOCK`, a system call that a signal has interrupted. Most
/// operations of io_uring turn them into `EINTR`, `fallocate` does not.
const ERESTARTSYS: u16 = 512;
const ERESTARTNOHAND: u16 = 514;
const ERESTART_RESTARTBLOCK: u16 = 516;

/// An error number from 1 to 4095, whether or not it has a name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawErrno(NonZeroU16);

impl RawErrno {
    /// Input/output error.
    pub const EIO: RawErrno = RawErrno(NonZeroU16::new(Errno::EIO as u16).unwrap());

    /// The number as an error; `None` unless it is 1 to 4095.
    pub fn new(number: i32) -> Option<Self> {
        let number = u16::try_from(number).ok().filter(|number| *number <= MAX)?;
        NonZeroU16::new(number).map(RawErrno)
    }

    /// Splits the result of a system call or completion. A negative number that is no errno is `EIO`.
    pub(crate) fn check(result: i32) -> Result<u32, Self> {
        u32::try_from(result).map_err(|_| result.checked_neg().and_then(Self::new).unwrap_or(Self::EIO))
    }

    /// The number.
    pub fn get(self) -> i32 {
        self.0.get().into()
    }

    /// The error as one that is known outside the kernel. `EIO` if there is no such.
    pub fn known(self) -> Errno {
        match self.0.get() {
            ENOTSUPP => Errno::EOPNOTSUPP,
            ERESTARTSYS..=ERESTARTNOHAND | ERESTART_RESTARTBLOCK => Errno::EINTR,
            number if number <= LAST_PUBLIC => match Errno::from_raw(number.into()) {
                Errno::UnknownErrno => Errno::EIO,
                errno => errno,
            },
            _ => Errno::EIO,
        }
    }
}

/// Compares with what the error is [known](RawErrno::known) as.
impl PartialEq<Errno> for RawErrno {
    fn eq(&self, other: &Errno) -> bool {
        self.known() == *other
    }
}

/// `UnknownErrno`, where the number is lost, becomes `EIO`.
impl From<Errno> for RawErrno {
    fn from(errno: Errno) -> Self {
        Self::new(errno as i32).unwrap_or(Self::EIO)
    }
}

/// The error's number; without one, that of its kind for those that the block layer distinguishes, and `EIO` for others.
impl From<&io::Error> for RawErrno {
    fn from(error: &io::Error) -> Self {
        error.raw_os_error().and_then(Self::new).unwrap_or_else(|| match error.kind() {
            io::ErrorKind::OutOfMemory => Errno::ENOMEM.into(),
            io::ErrorKind::StorageFull => Errno::ENOSPC.into(),
            io::ErrorKind::TimedOut => Errno::ETIMEDOUT.into(),
            io::ErrorKind::Unsupported => Errno::EOPNOTSUPP.into(),
            _ => Self::EIO,
        })
    }
}

impl fmt::Display for RawErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Errno::from_raw(self.get()) {
            Errno::UnknownErrno => write!(f, "errno {}", self.0),
            errno => errno.fmt(f),
        }
    }
}

impl fmt::Debug for RawErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Errno::from_raw(self.get()) {
            Errno::UnknownErrno => write!(f, "RawErrno({})", self.0),
            errno => errno.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_is_known_as_one_that_is_not_success() {
        for number in 1..=i32::from(MAX) {
            let errno = RawErrno::new(number).unwrap();
            assert_eq!(errno.get(), number);
            assert!((1..=i32::from(LAST_PUBLIC)).contains(&(errno.known() as i32)), "{number}: {:?}", errno.known());
        }
        assert_eq!([0, -5, 4096, i32::MAX, i32::MIN].map(RawErrno::new), [None; 5]);
    }

    #[test]
    fn errors_of_the_kernel_alone_keep_their_meaning() {
        let known = |number| RawErrno::new(number).unwrap().known();
        assert_eq!([524, 512, 516, 28].map(known), [Errno::EOPNOTSUPP, Errno::EINTR, Errno::EINTR, Errno::ENOSPC]);
        assert_eq!([41, 58, 134, 503, 511, 528, 600].map(known), [Errno::EIO; 7]);
    }

    #[test]
    fn a_negative_result_is_an_error_whatever_its_number() {
        assert_eq!(RawErrno::check(7), Ok(7));
        assert_eq!(RawErrno::check(-503).unwrap_err().get(), 503);
        assert_eq!([-4096, i32::MIN].map(RawErrno::check), [Err(RawErrno::EIO); 2]);
    }

    #[test]
    fn an_errno_that_was_lost_is_not_success() {
        assert_eq!(RawErrno::from(Errno::from_raw(503)), RawErrno::EIO);
        assert_eq!(RawErrno::from(&io::Error::from_raw_os_error(0)), RawErrno::EIO);
        assert_eq!(RawErrno::from(&io::Error::other("no number")), RawErrno::EIO);
        assert_eq!(RawErrno::from(&io::ErrorKind::InvalidData.into()), RawErrno::EIO);
    }

    #[test]
    fn a_kind_of_error_has_an_errno() {
        assert_eq!(RawErrno::from(&io::ErrorKind::StorageFull.into()), Errno::ENOSPC);
        assert_eq!(RawErrno::from(&io::ErrorKind::Unsupported.into()), Errno::EOPNOTSUPP);
    }

    #[test]
    fn an_errno_without_a_name_shows_its_number() {
        let [named, unnamed] = [28, 503].map(|number| RawErrno::new(number).unwrap());
        assert_eq!((named.to_string(), unnamed.to_string()), (Errno::ENOSPC.to_string(), "errno 503".into()));
    }
}
