//! The screen's loop: keys, events and time in, drawings and calls to the client out.

use std::time::Duration;

use crossterm::event::{DisableBracketedPaste, EnableBracketedPaste, Event as Terminal, EventStream};
use futures_util::StreamExt as _;
use ratatui::DefaultTerminal;
use tokio::sync::broadcast;

use super::ChatArgs;
use super::app::{App, Popup, Wish};
use super::command::{self, Action, Input};
use super::{plain, view};
use crate::client::{Client, ConversationId, Event, Live, Recipient};

/// Messages read at once.
const PAGE: usize = 200;
/// How often the screen is looked at without any cause: typing marks and notes go away.
const TICK: Duration = Duration::from_secs(1);
/// Notices that are kept.
const NOTICES: usize = 200;

/// Runs until the person leaves; the terminal is as before then, also after a panic.
pub(super) async fn run(client: &Client, args: &ChatArgs) -> anyhow::Result<()> {
    let mut app = App::new(args.identity.to_string(), client.account());
    refresh_list(client, &mut app).await?;
    let first = match &args.to {
        Some(to) => open(client, &mut app, to.clone().into()).await,
        None => app.list().first().copied(),
    };
    if let Some(first) = first {
        app.show(first);
    }
    let mut terminal = ratatui::try_init()?;
    let _ = crossterm::execute!(std::io::stdout(), EnableBracketedPaste);
    let outcome = serve(client, &mut app, &mut terminal).await;
    let _ = crossterm::execute!(std::io::stdout(), DisableBracketedPaste);
    ratatui::restore();
    outcome
}

async fn serve(client: &Client, app: &mut App, terminal: &mut DefaultTerminal) -> anyhow::Result<()> {
    let mut keys = EventStream::new();
    let mut events = client.events().await?;
    let mut live = client.live();
    let mut connection = client.connection();
    let mut tick = tokio::time::interval(TICK);
    let mut loaded = PAGE;
    refresh(client, app, loaded).await?;
    loop {
        app.connection = *connection.borrow_and_update();
        terminal.draw(|frame| view::draw(frame, app))?;
        tokio::select! {
            key = keys.next() => {
                let wish = match key {
                    Some(Ok(Terminal::Key(key))) => app.key(key),
                    Some(Ok(Terminal::Paste(text))) => app.paste(&text),
                    Some(Ok(_)) => Wish::None,
                    Some(Err(error)) => return Err(error.into()),
                    None => return Ok(()),
                };
                match wish {
                    Wish::None => continue,
                    Wish::Quit => return Ok(()),
                    Wish::Older => loaded += PAGE,
                    Wish::Opened(_) => loaded = PAGE,
                    Wish::Typing(started) => {
                        if let Some(with) = app.open {
                            // Nobody is harmed if it is not told.
                            let _ = client.typing(with, started).await;
                        }
                        continue;
                    }
                    Wish::Line(line) => if !entered(client, app, &line).await? { return Ok(()) },
                }
                refresh(client, app, loaded).await?;
            }
            batch = events.next_batch() => {
                let batch = batch?;
                let Some((last, _)) = batch.last() else { return Ok(()) };
                batch.iter().for_each(|(_, event)| happened(app, event));
                events.handled(*last).await?;
                refresh(client, app, loaded).await?;
            }
            change = live.recv() => match change {
                Ok(Live::Typing { account, started }) => app.typing_changed(account, started),
                Ok(Live::Connection { .. }) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            },
            _ = tick.tick() => {}
        }
    }
}

async fn refresh_list(client: &Client, app: &mut App) -> anyhow::Result<()> {
    app.conversations = client.conversations().await?;
    app.groups = client.groups().await?;
    Ok(())
}

/// Reads what is shown anew, and marks it as read.
async fn refresh(client: &Client, app: &mut App, loaded: usize) -> anyhow::Result<()> {
    if let Some(with) = app.open {
        let messages = client.history(with, u64::MAX, loaded).await?;
        // What is scrolled away was not seen.
        if let Some(newest) = messages.last().filter(|_| app.scroll == 0) {
            client.mark_read(with, newest.position).await?;
        }
        if with.group().is_some() {
            for author in messages.iter().map(|message| message.author) {
                if let (false, Some(name)) = (app.names.contains_key(&author), client.identities_of(author).await?.first()) {
                    app.names.insert(author, name.to_string());
                }
            }
        }
        app.set_messages(messages);
    }
    refresh_list(client, app).await
}

fn happened(app: &mut App, event: &Event) {
    if let Event::Message { conversation, message, .. } = event {
        app.typing_changed(*conversation, false);
        if app.open.is_none() {
            app.show(*conversation);
        } else if app.open != Some(*conversation)
            && message.as_ref().is_some_and(|message| !message.outgoing)
            && app.group(*conversation).is_none_or(|group| !group.muted)
        {
            let name = app.name(*conversation);
            app.note(format!("new from {name}"));
        }
    }
    let about = plain::conversation_of(event);
    let name = about.map(|about| app.name(about)).unwrap_or_default();
    if let Some(text) = plain::notice(event, &name) {
        let after = app.messages.last().filter(|_| about.is_none() || about == app.open).map_or(u64::MAX, |message| message.position);
        app.note(text.trim_start_matches(['!', '#', ' ']).to_owned());
        app.notices.push((about, after, text));
        if app.notices.len() > NOTICES {
            app.notices.remove(0);
        }
    }
}

/// Does what was entered; whether to go on.
async fn entered(client: &Client, app: &mut App, line: &str) -> anyhow::Result<bool> {
    match command::parse(line) {
        Input::Empty => {}
        Input::Quit => return Ok(false),
        Input::Wrong(why) => app.note(why),
        Input::Help => app.popup = Some(Popup { title: "Help".into(), lines: command::help() }),
        Input::Read => {
            if let Some(with) = app.open {
                client.mark_read(with, u64::MAX).await?;
            }
        }
        Input::To(to) => {
            if let Some(conversation) = open(client, app, to).await {
                app.show(conversation);
            }
        }
        Input::CreateGroup(name) => match client.create_group(&name).await {
            Ok(group) => app.show(group.into()),
            Err(error) => app.note(command::why(error)),
        },
        Input::OpenGroup(name) => match command::find_group(client, &name).await {
            Ok(group) => app.show(group.into()),
            Err(why) => app.note(why),
        },
        Input::Text(text) => send(client, app, text).await,
        Input::Do(action) => {
            let title = match action {
                Action::Safety => format!("Safety number with {}", app.open.map(|with| app.name(with)).unwrap_or_default()),
                Action::Devices => "Your devices".into(),
                Action::Me => "You".into(),
                Action::Groups => "Your groups".into(),
                Action::Who => format!("Members of {}", app.open.map(|with| app.name(with)).unwrap_or_default()),
                _ => String::new(),
            };
            match command::perform(client, app.open, action).await {
                Ok(lines) if lines.is_empty() => {}
                Ok(lines) if title.is_empty() => app.note(lines.join(" ")),
                Ok(lines) => app.popup = Some(Popup { title, lines }),
                Err(why) => app.note(why),
            }
        }
    }
    Ok(true)
}

async fn send(client: &Client, app: &mut App, text: String) {
    let Some(with) = app.open else {
        app.note("nobody to send to yet: /to bob@vignette");
        return;
    };
    app.scroll = 0;
    if let Err(error) = client.send_text(with, &text).await {
        app.note(command::why(error));
        // Not lost: it can be changed and sent again.
        app.cursor = text.len();
        app.input = text;
    }
}

async fn open(client: &Client, app: &mut App, to: Recipient) -> Option<ConversationId> {
    match client.conversation(&to).await {
        Ok(conversation) => Some(conversation),
        Err(error) => {
            app.note(command::why(error));
            None
        }
    }
}
