-- A domain is checked where a value becomes one. A CHECK of a table is checked by every statement, which reads and plans
-- it anew each time: these three would take an eighth of a write.
CREATE DOMAIN ulid AS text COLLATE "C" CONSTRAINT ulid_check CHECK (VALUE ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$');
CREATE DOMAIN not_blank AS varchar(256) CONSTRAINT not_blank_check CHECK (VALUE ~ '\S');
CREATE DOMAIN document AS jsonb
    CONSTRAINT document_check CHECK (jsonb_typeof(VALUE) = 'object')
    -- At most 100 levels of objects and arrays.
    CONSTRAINT document_depth_check
        CHECK (NOT VALUE @? 'strict $.**{100} ? (@.type() == "object" || @.type() == "array")');
CREATE TYPE operation AS ENUM ('create', 'update', 'delete');

CREATE TABLE applications (
    id         ulid CONSTRAINT applications_pkey PRIMARY KEY,
    name       not_blank NOT NULL,
    comments   varchar(1024),
    version    integer NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    etag       text COLLATE "C" NOT NULL,
    CONSTRAINT applications_name_key UNIQUE (name)
);

CREATE TABLE configurations (
    id             ulid CONSTRAINT configurations_pkey PRIMARY KEY,
    application_id ulid NOT NULL,
    name           not_blank NOT NULL,
    comments       varchar(1024),
    config         document NOT NULL,
    size           integer NOT NULL,  -- bytes of config as PostgreSQL prints it
    version        integer NOT NULL,
    created_at     timestamptz NOT NULL,
    updated_at     timestamptz NOT NULL,
    etag           text COLLATE "C" NOT NULL,
    CONSTRAINT configurations_application_id_fkey
        FOREIGN KEY (application_id) REFERENCES applications (id) ON DELETE CASCADE,
    CONSTRAINT configurations_application_id_name_key UNIQUE (application_id, name),
    CONSTRAINT configurations_size_check CHECK (size <= 8388608)
);

-- What GET shows of a configuration. Processes that run use it: a migration that shows more makes another type.
CREATE TYPE shown_configuration AS (
    id             text,
    application_id text,
    name           varchar,
    comments       varchar,
    config         jsonb,
    version        integer,
    created_at     timestamptz,
    updated_at     timestamptz
);

CREATE INDEX configurations_config_idx ON configurations USING gin (config jsonb_path_ops);
-- With the application, so that a read by both names is one look-up by whichever index is taken.
CREATE INDEX configurations_name_idx ON configurations (name, application_id);

-- Every state that a configuration ever had. It outlives the configuration, so it does not refer to it.
CREATE TABLE configuration_versions (
    position         bigint GENERATED ALWAYS AS IDENTITY,
    configuration_id ulid NOT NULL,
    application_id   ulid NOT NULL,
    name             not_blank NOT NULL,
    comments         varchar(1024),
    config           document,  -- NULL for a deletion: the document is in the version before it
    size             integer NOT NULL,
    version          integer NOT NULL,
    operation        operation NOT NULL,
    actor            not_blank NOT NULL,
    recorded_at      timestamptz NOT NULL,
    CONSTRAINT configuration_versions_pkey PRIMARY KEY (configuration_id, version),
    CONSTRAINT configuration_versions_position_key UNIQUE (position),
    CONSTRAINT configuration_versions_config_check CHECK ((config IS NULL) = (operation = 'delete'))
);

CREATE INDEX configuration_versions_application_id_idx ON configuration_versions (application_id, position);

-- What a writer says of versions, sizes, times and ETags does not count: they follow from what happens to the row.
-- Functions resolve names in the schema of this migration, whatever the search_path of the caller is.

-- An ETag holds the time too: in a database that went back in time the numbers of versions repeat.
-- It reads no table, so it needs no search_path, without which PostgreSQL can inline it.
CREATE FUNCTION make_etag(id text, version integer, updated_at timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('"%s.%s.%s"', id, version, (extract(epoch FROM updated_at) * 1000000)::bigint)
$$;

CREATE FUNCTION keep_application() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.version := 1;
        NEW.created_at := clock_timestamp();
        NEW.updated_at := NEW.created_at;
    ELSIF NEW.id <> OLD.id THEN
        RAISE 'the id of an application cannot be changed' USING ERRCODE = 'restrict_violation';
    -- A trigger within a trigger: a configuration was added or removed.
    ELSIF pg_trigger_depth() > 1 OR (NEW.name, NEW.comments) IS DISTINCT FROM (OLD.name, OLD.comments) THEN
        NEW.version := OLD.version + 1;
        NEW.created_at := OLD.created_at;
        NEW.updated_at := clock_timestamp();
    ELSE
        RETURN OLD;
    END IF;
    NEW.etag := make_etag(NEW.id, NEW.version, NEW.updated_at);
    RETURN NEW;
END
$$;

-- The application is written first, so that every writer locks it first: none deadlock, and versions count one by one.
CREATE FUNCTION keep_configuration() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    printed text := NEW.config::text;
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        UPDATE applications SET version = version + 1 WHERE id = coalesce(NEW.application_id, OLD.application_id);
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    ELSIF TG_OP = 'INSERT' THEN
        -- One that was deleted and comes back goes on counting.
        NEW.version := 1 + coalesce(
            (SELECT max(version) FROM configuration_versions WHERE configuration_id = NEW.id), 0
        );
        NEW.created_at := clock_timestamp();
        NEW.updated_at := NEW.created_at;
    ELSIF (NEW.id, NEW.application_id) IS DISTINCT FROM (OLD.id, OLD.application_id) THEN
        RAISE 'the ids of a configuration cannot be changed' USING ERRCODE = 'restrict_violation';
    -- Also as text, because jsonb takes 1 and 1.0 for equal, and GET shows them as they are.
    ELSIF (NEW.name, NEW.comments, NEW.config) IS DISTINCT FROM (OLD.name, OLD.comments, OLD.config)
        OR printed <> OLD.config::text THEN
        NEW.version := OLD.version + 1;
        NEW.created_at := OLD.created_at;
        NEW.updated_at := clock_timestamp();
    ELSE
        RETURN OLD;
    END IF;
    NEW.size := octet_length(printed);
    NEW.etag := make_etag(NEW.id, NEW.version, NEW.updated_at);
    RETURN NEW;
END
$$;

-- After the change: ON CONFLICT calls what runs before an INSERT also for a row that is not inserted.
CREATE FUNCTION record_configuration_version() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    -- The service sets it in the statement that writes. SQL by hand does not.
    actor text := coalesce(nullif(current_setting('config_service.actor', true), ''), 'database:' || session_user);
    operation operation := CASE TG_OP WHEN 'INSERT' THEN 'create' WHEN 'UPDATE' THEN 'update' ELSE 'delete' END;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.version = OLD.version THEN
        RETURN NULL;
    ELSIF TG_OP = 'DELETE' THEN
        NEW := OLD;
        NEW.config := NULL;
        NEW.size := 0;
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
    END IF;
    INSERT INTO configuration_versions
        (configuration_id, application_id, name, comments, config, size, version, operation, actor, recorded_at)
    VALUES
        (NEW.id, NEW.application_id, NEW.name, NEW.comments, NEW.config, NEW.size, NEW.version, operation, actor,
         NEW.updated_at);
    RETURN NULL;
END
$$;

CREATE FUNCTION keep_configuration_versions() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('config_service.pruning', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE 'configuration_versions is append-only: call prune_configuration_versions() to remove old ones'
        USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER applications_keep BEFORE INSERT OR UPDATE ON applications
    FOR EACH ROW EXECUTE FUNCTION keep_application();
CREATE TRIGGER configurations_keep BEFORE INSERT OR UPDATE OR DELETE ON configurations
    FOR EACH ROW EXECUTE FUNCTION keep_configuration();
CREATE TRIGGER configurations_record AFTER INSERT OR UPDATE OR DELETE ON configurations
    FOR EACH ROW EXECUTE FUNCTION record_configuration_version();
CREATE TRIGGER configuration_versions_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON configuration_versions
    FOR EACH STATEMENT EXECUTE FUNCTION keep_configuration_versions();

-- Volatile, so that it sees what was committed while its statement waited for the application's row:
-- once that row is locked, no configuration comes or goes.
CREATE FUNCTION configuration_ids_now(application text) RETURNS text[]
LANGUAGE sql VOLATILE SET search_path FROM CURRENT AS $$
    SELECT ARRAY(SELECT id FROM configurations WHERE application_id = application ORDER BY id)
$$;

-- JSON Merge Patch (RFC 7396).
CREATE FUNCTION merge_patch(target jsonb, patch jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE SET search_path FROM CURRENT AS $$
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    IF jsonb_typeof(target) IS DISTINCT FROM 'object' THEN
        target := '{}';
    END IF;
    RETURN coalesce(
        (
            SELECT jsonb_object_agg(key, CASE WHEN p.value IS NULL THEN t.value ELSE merge_patch(t.value, p.value) END)
            FROM jsonb_each(target) AS t FULL JOIN jsonb_each(patch) AS p USING (key)
            WHERE p.value IS DISTINCT FROM 'null'
        ),
        '{}'
    );
END
$$;

-- Removes the versions that are older than an age and not among the newest `keep` of their configuration, and
-- all versions of a configuration that was deleted before that age. Returns how many it removed.
CREATE FUNCTION prune_configuration_versions(older_than interval, keep integer) RETURNS bigint
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    removed bigint;
BEGIN
    IF older_than IS NULL OR keep IS NULL OR keep < 1 THEN
        RAISE 'prune_configuration_versions(older_than, keep) needs an age, and at least 1 to keep'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM set_config('config_service.pruning', 'on', true);
    DELETE FROM configuration_versions AS v
    USING (
        SELECT configuration_id, version, row_number() OVER newest_first AS place,
               first_value(operation) OVER newest_first AS last_operation,
               first_value(recorded_at) OVER newest_first AS last_recorded_at
        FROM configuration_versions
        WINDOW newest_first AS (PARTITION BY configuration_id ORDER BY version DESC)
    ) AS ranked
    WHERE v.configuration_id = ranked.configuration_id
      AND v.version = ranked.version
      AND v.recorded_at < now() - older_than
      AND (ranked.place > keep OR ranked.last_operation = 'delete' AND ranked.last_recorded_at < now() - older_than);
    GET DIAGNOSTICS removed = ROW_COUNT;
    PERFORM set_config('config_service.pruning', 'off', true);
    RETURN removed;
END
$$;
